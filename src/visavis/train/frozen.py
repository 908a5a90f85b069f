"""Stages on frozen vectors: the connector's start and the embedding head. Seconds of fitting each.

Their results lie in `out/<stage>.safetensors`; a run that goes on reads them instead of fitting
again. Knows how records become vectors; the fitting itself is in `words.py` and `pair.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from visavis.files import write_atomically
from visavis.model.head import mean_per_group
from visavis.processing.pack import batches, pack
from visavis.train.pair import PairSettings, fit_pair, stack_pairs
from visavis.train.recipe import HeadStage, WordsStage
from visavis.train.words import fit_words, word_targets

if TYPE_CHECKING:
    from visavis.train.run import Run

BATCH_TOKENS = 2048
MAX_TEXT_TOKENS = 256


def run_frozen_stage(run: Run, stage: WordsStage | HeadStage) -> None:
    """Fit the stage, or read what it found before, and put it into the model."""
    path = run.out / f"{stage.name}.safetensors"
    if path.is_file():
        found = load_file(path)
    else:
        found = fit_start(run, stage) if isinstance(stage, WordsStage) else fit_head(run, stage)
        with write_atomically(path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in found.items()}, temporary)
    unknown = run.vlm.load_state_dict(found, strict=False).unexpected_keys
    assert not unknown, unknown


def fit_start(run: Run, stage: WordsStage) -> dict[str, Tensor]:
    """Return the connector that maps pictures to the words of their captions.

    It is the same for each of the patches that a token folds together, so a token is the mean of
    its patches' words.
    """
    assert run.vlm.connector is not None
    embeddings = run.vlm.decoder.embed.weight
    means, targets = [], []
    for name in stage.sources:
        means.append(run.features.means(run.rows(name)))
        targets.append(word_targets(run.source(name), run.encoder.tokenizer, embeddings))
    weight, bias = fit_words(torch.cat(means), torch.cat(targets), embeddings)
    folds = run.vlm.connector.config.shuffle**2
    return {
        "connector.layers.0.weight": (weight / folds).repeat(1, folds),
        "connector.layers.0.bias": bias,
    }


def fit_head(run: Run, stage: HeadStage) -> dict[str, Tensor]:
    """Return the embedding head under which pictures and captions of the sources agree."""
    pictures, texts, groups = [], [], []
    for name, times in stage.sources.items():
        matched = run.matched(name, flip=stage.flip)
        views = [run.features.means([one.rows[view] for one in matched]) for view in (0, -1)]
        pictures += [torch.stack(views)] * times
        texts += [text_states(run, [one.record.caption for one in matched])] * times
        groups += [one.group for one in matched] * times
    number = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    pairs = [
        fit_pair(
            torch.cat(pictures, 1),
            torch.cat(texts)[None],
            PairSettings(
                dim=run.recipe.head.dim // stage.members,
                epochs=stage.epochs,
                batch=stage.batch,
                learning_rate=stage.learning_rate,
                dropout=stage.dropout,
                logit_scale=stage.logit_scale,
                alpha=stage.alpha,
                seed=run.recipe.seed + member,
            ),
            groups=torch.tensor([number[group] for group in groups]),
        )
        for member in range(stage.members)
    ]
    pair = stack_pairs(pairs)
    return {
        "head.image.weight": pair.image_weight,
        "head.image.bias": pair.image_bias,
        "head.text.weight": pair.text_weight,
        "head.text.bias": pair.text_bias,
    }


@torch.inference_mode()
def text_states(run: Run, texts: list[str]) -> Tensor:
    """Return mean hidden states at the head's layers, [N, layers * D]."""
    encoded = [run.encoder.text(text, MAX_TEXT_TOKENS) for text in texts]
    layers = run.recipe.head.layers
    states = torch.empty(len(texts), len(layers) * run.vlm.config.decoder.width)
    lengths = [len(one.token_ids) for one in encoded]
    done = 0
    for group in batches(lengths, BATCH_TOKENS):
        batch = pack([encoded[i] for i in group])
        found = run.vlm(batch, layers)
        hidden = torch.cat([found[layer] for layer in layers], -1)
        states[group] = mean_per_group(hidden, batch.owners, len(group))[0]
        done += len(group)
        run.report("text states", done, len(texts), "")
    return states
