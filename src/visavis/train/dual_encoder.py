"""The embedding head of a dual encoder, fitted on frozen vectors of images and texts.

The image side starts at the names of the classes that the vision tower recognises, the text side at
the text tower's own vectors (`embedding_head.ClassNames`). What is learned is added: a linear map
of the mean feature from zero, and a linear map of the text vector from the identity, by InfoNCE in
both directions. Then both are taken back part of the way to the start (`shrink`): it keeps what the
towers know of things that no training image shows, as in WiSE-FT (Wortsman et al. 2022).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visavis.checkpoints import bundled
from visavis.checkpoints.compose import everyday_words
from visavis.checkpoints.efficientnet import load_efficientnet
from visavis.data.datasets import LONG_WORDS, Record, imagenet_classes, sentences
from visavis.data.kinds import with_article
from visavis.errors import TrainError
from visavis.inputs import Prompt
from visavis.model.connectors.words import SPELLING, Words
from visavis.model.embedding_head import ClassNames
from visavis.processing.collate import batches, pack
from visavis.train.context import TrainingRun
from visavis.train.recipe import HeadStage

BATCH_TOKENS = 4096
WARMUP = 0.1  # share of the steps


def fit_dual(
    run: TrainingRun, stage: HeadStage, pairs: Sequence[tuple[Record, Tensor]]
) -> dict[str, Tensor]:
    """Return the head, and the words of a `words` connector, by their names in the model.

    Args:
        pairs: records with captions and their mean features [W].

    Raises:
        TrainError: the model is no dual encoder whose head starts from class names.
    """
    vlm = run.loaded.vlm
    head = vlm.head
    if vlm.text_tower is None or head is None or not isinstance(head.image, ClassNames):
        raise TrainError(
            f"stage {stage.name!r} fits the head of a dual encoder, and the model has none; add "
            "`text_tower` and `head` with `class_names: true` under `model`, or take it out."
        )
    spelled = spelled_words(run) if isinstance(vlm.connector, Words) else {}
    _, classifier = load_efficientnet(bundled.fetch("nano")["vision_tower"])
    head.image.classify.load_state_dict({"weight": classifier.weight, "bias": classifier.bias})
    head.image.names.data.copy_(class_name_vectors(run))
    features = torch.stack([feature for _, feature in pairs])
    with torch.inference_mode():
        start = torch.cat([head.image.named(chunk) for chunk in features.split(4096)]).clone()
    texts, groups = _texts([record for record, _ in pairs])
    numbers = {
        text: number for number, text in enumerate(dict.fromkeys(chain.from_iterable(texts)))
    }
    vectors = text_vectors(run, list(numbers))
    choices = [[numbers[text] for text in own] for own in texts]
    image, text = fit_maps(features, start, vectors, choices, groups, stage, run.recipe.seed)
    identity = torch.eye(vectors.shape[1])
    found = {
        "head.image.classify.weight": classifier.weight,
        "head.image.classify.bias": classifier.bias,
        "head.image.names": head.image.names.data,
        "head.image.learned.weight": stage.shrink * image[0],
        "head.image.learned.bias": stage.shrink * image[1],
        "head.text.weight": identity + stage.shrink * text[0],
        "head.text.bias": stage.shrink * text[1],
    }
    if spelled:
        photos = text_vectors(run, [f"a photo of {with_article(w)}" for w in everyday_words()])
        photos = F.linear(photos, found["head.text.weight"], found["head.text.bias"])
        found |= spelled | {"connector.word_vectors": F.normalize(photos, dim=-1)}
    return found


def fit_maps(
    features: Tensor,  # [N, W]
    start: Tensor,  # unit vectors of class names [N, D]
    vectors: Tensor,  # unit vectors of all texts [M, D]
    choices: Sequence[Sequence[int]],  # the texts of each pair
    groups: Tensor,  # int64 [N]: pairs of one group are no negatives of each other
    stage: HeadStage,
    seed: int,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return weight and bias of what is added on the image side and on the text side."""
    mean, deviation = features.mean(0), features.std(0) + 1e-3
    scaled = (features - mean) / deviation
    num, batch = len(features), min(stage.batch, len(features))
    total = stage.epochs * (num // batch)
    sums: list[Tensor] = []
    for member in range(stage.members):
        generator = torch.Generator().manual_seed(seed + member)
        draw = random.Random(seed + member)
        with torch.random.fork_rng(devices=[]):
            image = nn.Linear(features.shape[1], vectors.shape[1])
            text = nn.Linear(vectors.shape[1], vectors.shape[1])
        rates = {image: stage.learning_rate, text: stage.text_learning_rate}
        decays = {image: stage.weight_decay, text: 0.0}
        for layer in rates:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        optimizer = torch.optim.AdamW(
            [
                {"params": layer.parameters(), "lr": rate, "weight_decay": decays[layer]}
                for layer, rate in rates.items()
            ]
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, list(rates.values()), total_steps=total, pct_start=WARMUP
        )
        for _ in range(stage.epochs):
            order = torch.randperm(num, generator=generator)
            for chosen in order.split(batch)[: num // batch]:
                own = torch.tensor([draw.choice(choices[i]) for i in chosen.tolist()])
                kept = torch.rand(len(chosen), features.shape[1], generator=generator)
                x = scaled[chosen] * (kept >= stage.dropout) / (1 - stage.dropout)
                y = vectors[own]
                equal = (groups[chosen][:, None] == groups[chosen]) | (own[:, None] == own)
                scores = stage.logit_scale * (
                    F.normalize(y + text(y), dim=-1)
                    @ F.normalize(start[chosen] + image(x), dim=-1).T
                )
                scores = scores.masked_fill(equal.fill_diagonal_(False), -torch.inf)
                own = torch.arange(len(chosen))
                loss = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        weight = image.weight.detach() / deviation
        maps = [weight, image.bias.detach() - weight @ mean, text.weight.detach(), text.bias.data]
        sums = maps if not sums else [a + b for a, b in zip(sums, maps, strict=True)]
    a, b, c, d = (one / stage.members for one in sums)
    return (a, b), (c, d)


def class_name_vectors(run: TrainingRun) -> Tensor:
    """Return a unit text vector for each ImageNet class, of all its names, [1000, D]."""
    names = [names_of(record) for record in imagenet_classes(run.data, "train")]
    texts = [[f"a photo of {with_article(own[0])}", own[0], *own] for own in names]
    vectors = text_vectors(run, list(chain.from_iterable(texts)))
    sums = [own.sum(0) for own in vectors.split([len(own) for own in texts])]
    return F.normalize(torch.stack(sums), dim=-1)


def names_of(record: Record) -> list[str]:
    """Return all names of a class of ImageNet."""
    names, _, _ = record.also[0].partition(":")
    return [name.strip() for name in names.split(",")]


def spelled_words(run: TrainingRun) -> dict[str, Tensor]:
    """Return the tokens of everyday words for the connector.

    Raises:
        TrainError: a word takes more tokens than a spelling has.
    """
    words, tokenizer = everyday_words(), run.loaded.tokenizer
    ids = torch.full((len(words), SPELLING), -1, dtype=torch.int32)
    for row, word in enumerate(words):
        spelled = tokenizer.encode(f" {word},", add_special_tokens=False).ids
        if len(spelled) > SPELLING:
            raise TrainError(f"the word {word!r} takes {len(spelled)} tokens, at most {SPELLING}.")
        ids[row, : len(spelled)] = torch.tensor(spelled, dtype=torch.int32)
    newline = tokenizer.encode("\n", add_special_tokens=False).ids
    return {
        "connector.word_ids": ids,
        "connector.pad_id": torch.tensor(newline[:1], dtype=torch.int32),
    }


def _texts(records: Sequence[Record]) -> tuple[list[list[str]], Tensor]:
    """Return the texts of each record, and which of them are of one group."""
    texts: list[list[str]] = []
    for record in records:
        caption, own = record.caption, [record.caption]
        if len(caption.split()) > LONG_WORDS:
            own += sentences(caption)[:1]
        else:
            own += record.also
        texts.append([text.lower().strip() for text in dict.fromkeys(own)])
    names = [record.label or own[0] for record, own in zip(records, texts, strict=True)]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return texts, torch.tensor([numbers[name] for name in names])


@torch.inference_mode()
def text_vectors(run: TrainingRun, texts: Sequence[str]) -> Tensor:
    """Return the text tower's unit vectors, [N, D]."""
    tower = run.loaded.vlm.text_tower
    assert tower is not None
    encoded = [run.encoder.item(Prompt.of(text)) for text in texts]
    found = torch.empty(len(texts), tower.config.width)
    lengths, done = [len(one.token_ids) for one in encoded], 0
    for group in batches(lengths, BATCH_TOKENS):
        batch = pack([encoded[i] for i in group]).to(run.accelerator.device)
        found[group] = tower(batch.token_ids, batch.lengths).cpu()
        done += len(group)
        run.report("text vectors", done, len(texts), "")
    return found.clone()
