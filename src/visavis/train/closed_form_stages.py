"""Fitted stages: connector initialisation from caption word embeddings, and the embedding head.

The connector is a ridge regression from an image's mean feature to the mean token embedding of the
content words of its captions. A language model reads such tokens as words from the first step;
started from vectors that only agree with text states, it ignored them for hundreds of steps
(dev/LOG.md). The embedding head is fitted on frozen image and text vectors.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from visavis.checkpoints import bundled
from visavis.checkpoints.efficientnet import Classifier, load_efficientnet
from visavis.data.datasets import Record, load_source
from visavis.errors import TrainError
from visavis.inputs import Image
from visavis.model.config import EfficientNetConfig
from visavis.train.context import TrainingRun
from visavis.train.dual_encoder import fit_dual
from visavis.train.feature_store import FeatureStore, key_of
from visavis.train.recipe import HeadStage, WordsStage, sources_of
from visavis.utils import write_atomically

MAX_WORDS = 24
RIDGE = 300.0
_FUNCTION_WORDS = (
    "a an the of in on at and or with is are to from by for its it this that as their his her be "
    "which shows show showing photo photograph image picture there two three one what color shape "
    "does not contain yes no present"
)
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
_WORD = re.compile(r"[a-z]+")


def content_words(record: Record) -> list[str]:
    """Return the words that say what a record's image shows, at most MAX_WORDS."""
    text = " ".join((record.caption, *record.also[:1]))
    if not text.strip():  # questions only: the answers name things
        text = " ".join(dict.fromkeys(answer for _, answer in record.questions))
    words = [word for word in _WORD.findall(text.lower()) if word not in FUNCTION_WORDS]
    return words[:MAX_WORDS]


def word_targets(records: Sequence[Record], tokenizer: Tokenizer, embeddings: Tensor) -> Tensor:
    """Return the mean token embedding of each record's content words, [N, D]; zero if none."""
    targets = torch.zeros(len(records), embeddings.shape[1])
    for number, record in enumerate(records):
        words = content_words(record)
        if words:
            pieces = tokenizer.encode_batch([f" {word}" for word in words])
            ids = [token for piece in pieces for token in piece.ids]
            targets[number] = embeddings[ids].float().mean(0)
    return targets


def fit_words(means: Tensor, targets: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight [D, W] and bias [D] of the map from mean features to image tokens.

    Targets are centred and made equally long first, so that rare words count as much as common
    ones. Tokens come out centred and as spread as the decoder's own embeddings.

    Args:
        means: mean features [N, W].
        targets: mean word embeddings [N, D]; rows of zeros are left out.
        embeddings: token embeddings of the decoder [vocab, D].
    """
    known = targets.abs().sum(1) > 0
    means, targets = means[known], targets[known]
    wanted = F.normalize(targets - targets.mean(0), dim=1)
    centre, deviation = means.mean(0), means.std(0) + 0.02
    x = (means - centre) / deviation
    gram = x.T @ x + RIDGE * torch.eye(x.shape[1])
    solution = torch.linalg.solve(gram, x.T @ wanted)  # [W, D]
    scale = embeddings.float().std() / (x @ solution).std(0).mean()
    weight = scale * (solution / deviation[:, None]).T
    return weight, -weight @ centre


STRENGTH = 8.0  # such features are as long as real ones; 0.55 of them get their class at top 1
MAX_FEATURE = 6.0  # ReLU6


def class_shifts(classifier: Classifier, means: Tensor) -> Tensor:
    """Return the shift from the mean feature towards each class, [classes, W].

    Args:
        means: mean features of real images [N, W].
    """
    centred = means - means.mean(0)
    scatter = centred.T @ centred / len(means)
    weight = classifier.weight.float()
    return STRENGTH * (weight - weight.mean(0)) @ scatter


def class_grids(shifts: Tensor, grids: Tensor, mean: Tensor, generator: torch.Generator) -> Tensor:
    """Return a grid of features for each class, [classes, P, W].

    Args:
        shifts: [classes, W].
        grids: features of real images to start from [classes, P, W].
        mean: mean feature over all images [W].
        generator: draws how strongly each class, and each patch, is shifted.
    """
    strength = 0.7 + 0.6 * torch.rand(len(shifts), 1, 1, generator=generator)
    spread = 0.5 + torch.rand(len(shifts), grids.shape[1], 1, generator=generator)
    mixed = 0.5 * grids + 0.5 * mean + strength * spread * shifts[:, None]
    return mixed.clamp(0, MAX_FEATURE)


CLASSES = "imagenet-classes"  # names without pictures: their features are made


def run_frozen_stage(run: TrainingRun, stage: WordsStage | HeadStage) -> None:
    """Fit the stage, or read what it found before, and put it into the model.

    Raises:
        TrainError: the model has no part of the kind that is fitted, or a source no records.
    """
    path = run.out / f"{stage.name}.safetensors"
    with run.accelerator.main_process_first():  # the others read what it found
        if path.is_file():
            found = load_file(path)
        else:
            if isinstance(stage, WordsStage):
                found = fit_start(run, stage)
            else:
                found = fit_dual(run, stage, pairs_of(run, stage))
            with write_atomically(path) as temporary:
                save_file({name: tensor.contiguous() for name, tensor in found.items()}, temporary)
    unknown = run.loaded.vlm.load_state_dict(found, strict=False).unexpected_keys
    assert not unknown, unknown


def fit_start(run: TrainingRun, stage: WordsStage) -> dict[str, Tensor]:
    """Return the connector that maps images to the words of their captions.

    It is the same for each of the patches that a token folds together, so a token is the mean of
    its patches' words.
    """
    vlm, store = run.loaded.vlm, store_of(run, stage)
    connector = vlm.config.connector
    if connector is None or connector.kind not in ("linear", "words"):
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


def pairs_of(run: TrainingRun, stage: HeadStage) -> list[tuple[Record, Tensor]]:
    """Return the records of a stage's sources that have captions, with their mean features."""
    store = store_of(run, stage)
    pairs: list[tuple[Record, Tensor]] = []
    for name, times in stage.sources.items():
        records = [record for record in records_of(run, name) if record.caption]
        pairs += list(zip(records, means_of(run, store, name, records), strict=True)) * times
    return pairs


# ---- records and their features ------------------------------------------------------------------


def store_of(run: TrainingRun, stage: WordsStage | HeadStage) -> FeatureStore:
    """Return the run's feature store.

    Raises:
        TrainError: it has none.
    """
    if run.features is None:
        raise TrainError(
            f"stage {stage.name!r} reads the vision tower's features; set feature_cache to true."
        )
    return run.features


def records_of(run: TrainingRun, name: str) -> list[Record]:
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
    run: TrainingRun,
    store: FeatureStore,
    name: str,
    records: Sequence[Record],
) -> Tensor:
    """Return the mean features of records' images, float32 [N, W]."""
    images, keys = [Image(record.image) for record in records], [record.key for record in records]
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        run.report(f"features of {name}", done, len(images), "")

    store.add(images, keys, report=tell)
    return store.means(images, keys)


def make_class_features(run: TrainingRun) -> None:
    """Make features for the names that have no image, if the recipe reads them.

    They start from those of the images of all other records that the recipe reads.

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
        keys = [key_of(Image(record.image), False) for record in records]
        if any(key not in store.places for key in keys):
            others = [n for n, one in read.items() if one.format == "records"]
            others = [name for name in others if name not in classes]
            store.put(keys, _made(run, store, others, len(keys), run.recipe.seed))


def _made(
    run: TrainingRun, store: FeatureStore, others: Sequence[str], num: int, seed: int
) -> np.ndarray:
    """Return features of the first classes that look like no image in particular."""
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
