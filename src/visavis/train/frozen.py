"""Stages on frozen vectors: the connector's start and the embedding head. Seconds of fitting each.

Their results lie in `out/<stage>.safetensors`; a run that goes on reads them instead of fitting
again. They read records, which have captions and labels, so their sources are of the format
`records`. Knows how records become vectors; the fitting itself is in `words.py` and `pair.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from visavis.checkpoints import bundled
from visavis.checkpoints.efficientnet import load_efficientnet
from visavis.data.records import Record
from visavis.data.sources import load_source
from visavis.errors import TrainError
from visavis.files import write_atomically
from visavis.model.config import EfficientNetConfig
from visavis.model.head import mean_per_group
from visavis.processing.pack import batches, pack
from visavis.processing.templates import Encoded
from visavis.prompt import Image, Prompt
from visavis.train.classes import class_grids, class_shifts
from visavis.train.features import FeatureStore, key_of
from visavis.train.pair import PairSettings, fit_pair, stack_pairs
from visavis.train.recipe import HeadStage, WordsStage, sources_of
from visavis.train.words import fit_words, word_targets

if TYPE_CHECKING:
    from visavis.train.run import Run

BATCH_TOKENS = 2048
MAX_TEXT_TOKENS = 256
CLASSES = "imagenet-classes"  # names without pictures: their features are made
UNMIRRORED = frozenset({"vqa-rad", "nlvr", "easy-vqa"})  # left and right matter


def run_frozen_stage(run: Run, stage: WordsStage | HeadStage) -> None:
    """Fit the stage, or read what it found before, and put it into the model.

    Raises:
        TrainError: the model has no part of the kind that is fitted, or a source no records.
    """
    path = run.out / f"{stage.name}.safetensors"
    with run.accelerator.main_process_first():  # the others read what it found
        if path.is_file():
            found = load_file(path)
        else:
            found = fit_start(run, stage) if isinstance(stage, WordsStage) else fit_head(run, stage)
            with write_atomically(path) as temporary:
                save_file({name: tensor.contiguous() for name, tensor in found.items()}, temporary)
    unknown = run.loaded.vlm.load_state_dict(found, strict=False).unexpected_keys
    assert not unknown, unknown


def fit_start(run: Run, stage: WordsStage) -> dict[str, Tensor]:
    """Return the connector that maps pictures to the words of their captions.

    It is the same for each of the patches that a token folds together, so a token is the mean of
    its patches' words.
    """
    vlm, store = run.loaded.vlm, store_of(run, stage)
    connector = vlm.config.connector
    if connector is None or connector.kind != "linear":
        raise TrainError(
            f"stage {stage.name!r} starts a connector of kind 'linear', and the model's is "
            f"{connector.kind if connector else 'none'!r}; take the stage out, or make it linear."
        )
    embeddings = vlm.decoder.embed.weight.detach().float().cpu()
    means, targets = [], []
    for name in stage.sources:
        records = records_of(run, name)
        means.append(means_of(run, store, name, records))
        targets.append(word_targets(records, run.loaded.tokenizer, embeddings))
    weight, bias = fit_words(torch.cat(means), torch.cat(targets), embeddings)
    folds = connector.shuffle**2
    return {
        "connector.layers.0.weight": (weight / folds).repeat(1, folds),
        "connector.layers.0.bias": bias,
    }


def fit_head(run: Run, stage: HeadStage) -> dict[str, Tensor]:
    """Return the embedding head under which pictures and captions of the sources agree."""
    head, store = run.loaded.vlm.config.head, store_of(run, stage)
    if head is None or not head.tower_width:
        raise TrainError(
            f"stage {stage.name!r} fits an embedding head that reads the vision tower, and the "
            "model has none; add `head` with `tower: true` under `model`, or take the stage out."
        )
    pictures, texts, groups = [], [], []
    for name, times in stage.sources.items():
        records = [record for record in records_of(run, name) if record.caption]
        views = [means_of(run, store, name, records)]
        if stage.flip:  # as many views of each
            mirrored = run.recipe.data[name].path not in UNMIRRORED
            views.append(means_of(run, store, name, records, flip=mirrored))
        pictures += [torch.stack(views)] * times
        texts += [text_states(run, [record.caption for record in records])] * times
        groups += [record.label or record.caption.lower() for record in records] * times
    number = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    pairs = [
        fit_pair(
            torch.cat(pictures, 1),
            torch.cat(texts)[None],
            PairSettings(
                dim=head.dim // stage.members,
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
def text_states(run: Run, texts: Sequence[str]) -> Tensor:
    """Return mean hidden states at the head's layers, [N, layers * D]."""
    vlm = run.loaded.vlm
    encoded = [_cut(run.encoder.item(Prompt.of(text))) for text in texts]
    found: list[Tensor] = [torch.empty(0)] * len(texts)
    done = 0
    for group in batches([len(one.token_ids) for one in encoded], BATCH_TOKENS):
        batch = pack([encoded[i] for i in group]).to(run.accelerator.device)
        means, _ = mean_per_group(vlm.head_states(batch), batch.owners, len(group))
        for index, row in zip(group, means.float().cpu(), strict=True):
            found[index] = row
        done += len(group)
        run.report("text states", done, len(texts), "")
    return torch.stack(found)


def _cut(encoded: Encoded) -> Encoded:
    encoded.token_ids = encoded.token_ids[:MAX_TEXT_TOKENS]
    return encoded


# ---- records and their features ------------------------------------------------------------------


def store_of(run: Run, stage: WordsStage | HeadStage) -> FeatureStore:
    """Return the run's feature store.

    Raises:
        TrainError: it has none.
    """
    if run.features is None:
        raise TrainError(
            f"stage {stage.name!r} reads the vision tower's features; set feature_cache to true."
        )
    return run.features


def records_of(run: Run, name: str) -> list[Record]:
    """Return the records of a source.

    Raises:
        TrainError: the source is of another format, or cannot be read.
    """
    source = run.recipe.data[name]
    if source.format != "records":
        raise TrainError(
            f"a stage of fitting reads {name!r}, which is of the format {source.format!r}; "
            "expected 'records', which have captions and labels."
        )
    return load_source(source.path, run.data)[: source.cap]


def means_of(
    run: Run, store: FeatureStore, name: str, records: Sequence[Record], *, flip: bool = False
) -> Tensor:
    """Return the mean features of records' pictures, float32 [N, W]."""
    images, keys = [Image(record.image) for record in records], [record.key for record in records]
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        run.report(f"features of {name}", done, len(images), "")

    store.add(images, keys, flip=flip, report=tell)
    return store.means(images, keys, flip=flip)


def make_class_features(run: Run) -> None:
    """Make features for the names that have no picture, if the recipe reads them.

    They start from those of the pictures of all other records that the recipe reads.

    Raises:
        TrainError: the vision tower has no classifier to make them from, or they have no store.
    """
    named = dict.fromkeys(name for stage in run.recipe.stages for name in sources_of(stage))
    read = {name: run.recipe.data[name] for name in named}
    classes = [name for name, one in read.items() if (one.format, one.path) == ("records", CLASSES)]
    if not classes:
        return
    if run.features is None or not isinstance(run.loaded.vlm.config.tower, EfficientNetConfig):
        raise TrainError(
            f"{classes[0]!r} has names without pictures, whose features are made from the "
            "classifier of efficientnet-lite2; use it as vision_tower and set feature_cache to "
            "true, or take the source out."
        )
    store = run.features
    with run.accelerator.main_process_first():
        store.refresh()
        records = [record for name in classes for record in records_of(run, name)]
        mirrored = any(isinstance(stage, HeadStage) and stage.flip for stage in run.recipe.stages)
        for flip in (False, True) if mirrored else (False,):
            keys = [key_of(Image(record.image), flip) for record in records]
            if any(key not in store.places for key in keys):
                others = [n for n, one in read.items() if one.format == "records"]
                others = [name for name in others if name not in classes]
                store.put(keys, _made(run, store, others, len(keys), run.recipe.seed + flip))


def _made(run: Run, store: FeatureStore, others: Sequence[str], num: int, seed: int) -> np.ndarray:
    """Return features of the first classes that look like no picture in particular."""
    sources = {run.recipe.data[name].path: (name, records_of(run, name)) for name in others}
    pictures = [record for _, records in sources.values() for record in records]
    if not pictures:
        raise TrainError(f"{CLASSES!r} needs another source of records: features are made of its")
    means = torch.cat([means_of(run, store, *source) for source in sources.values()])
    _, classifier = load_efficientnet(bundled.fetch("nano")["vision_tower"])
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(len(pictures), (num,), generator=generator).tolist()
    chosen = [pictures[number] for number in numbers]
    grids = class_grids(
        class_shifts(classifier, means)[:num],
        store.get([Image(record.image) for record in chosen], [record.key for record in chosen]),
        means.mean(0),
        generator,
    )
    return grids.half().numpy()
