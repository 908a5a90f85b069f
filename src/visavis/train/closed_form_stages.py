"""Fitted stages: connector initialisation from caption word embeddings, and the embedding head.

The connector is a ridge regression from an image's mean feature to the mean token embedding of the
content words of its captions. A language model reads such tokens as words from the first step;
started from vectors that only agree with text states, it ignored them for hundreds of steps
(dev/LOG.md). The embedding head is fitted on frozen image and text vectors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from visavis.checkpoints import bundled
from visavis.checkpoints.efficientnet import Classifier, load_efficientnet
from visavis.data.datasets import Record, load_source
from visavis.errors import TrainError
from visavis.inputs import Image, Prompt
from visavis.model.config import EfficientNetConfig
from visavis.model.embedding_head import mean_per_group
from visavis.processing.chat_template import Encoded
from visavis.processing.collate import batches, pack
from visavis.train.context import TrainingRun
from visavis.train.feature_store import FeatureStore, key_of
from visavis.train.losses import Contrast, contrastive_loss
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
    """Return the words that say what a record's picture shows, at most MAX_WORDS."""
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
    """Return what to add to a mean feature to make it of each class, [classes, W].

    Args:
        means: mean features of real pictures [N, W].
    """
    centred = means - means.mean(0)
    scatter = centred.T @ centred / len(means)
    weight = classifier.weight.float()
    return STRENGTH * (weight - weight.mean(0)) @ scatter


def class_grids(shifts: Tensor, grids: Tensor, mean: Tensor, generator: torch.Generator) -> Tensor:
    """Return a grid of features for each class, [classes, P, W].

    Args:
        shifts: [classes, W].
        grids: features of real pictures to start from [classes, P, W].
        mean: mean feature over all pictures [W].
        generator: draws how strongly each class, and each patch, is shifted.
    """
    strength = 0.7 + 0.6 * torch.rand(len(shifts), 1, 1, generator=generator)
    spread = 0.5 + torch.rand(len(shifts), grids.shape[1], 1, generator=generator)
    mixed = 0.5 * grids + 0.5 * mean + strength * spread * shifts[:, None]
    return mixed.clamp(0, MAX_FEATURE)


@dataclass(frozen=True)
class PairSettings:
    """How a pair of layers is trained; defaults are the baseline's."""

    dim: int = 256
    epochs: int = 20
    batch: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    dropout: float = 0.3
    logit_scale: float = 20.0
    alpha: float = 0.0
    seed: int = 0


@dataclass
class Pair:
    """Two affine maps from raw vectors to the shared space (not yet normalised)."""

    image_weight: Tensor  # [dim, image width]
    image_bias: Tensor  # [dim]
    text_weight: Tensor  # [dim, text width]
    text_bias: Tensor  # [dim]

    def images(self, x: Tensor) -> Tensor:
        return F.normalize(F.linear(x, self.image_weight, self.image_bias), dim=-1)

    def texts(self, y: Tensor) -> Tensor:
        return F.normalize(F.linear(y, self.text_weight, self.text_bias), dim=-1)


def fit_pair(
    images: Tensor,  # [V, N, image width]: V views of each picture
    texts: Tensor,  # [U, N, text width]: U texts of each picture
    settings: PairSettings,
    *,
    groups: Tensor | None = None,  # int64 [N]: pairs of one group are no negatives of each other
) -> Pair:
    """Train both layers; each step draws one view and one text of each picture."""
    generator = torch.Generator().manual_seed(settings.seed)
    image_scale, text_scale = _Scale(images), _Scale(texts)
    images, texts = image_scale(images), text_scale(texts)
    num_pairs = images.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        image_layer = nn.Linear(images.shape[-1], settings.dim)
        text_layer = nn.Linear(texts.shape[-1], settings.dim)
    parameters = [*image_layer.parameters(), *text_layer.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    batch = min(settings.batch, num_pairs)
    total = settings.epochs * (num_pairs // batch)
    step = 0
    for _ in range(settings.epochs):
        order = torch.randperm(num_pairs, generator=generator)
        for start in range(0, num_pairs - batch + 1, batch):
            chosen = order[start : start + batch]
            x = _draw(images, chosen, settings.dropout, generator)
            y = _draw(texts, chosen, settings.dropout, generator)
            excluded = None
            if groups is not None:
                excluded = groups[chosen][:, None] == groups[chosen][None]
            loss = contrastive_loss(
                F.normalize(text_layer(y), dim=-1),
                F.normalize(image_layer(x), dim=-1),
                Contrast(symmetric=True, alpha=settings.alpha),
                scale=settings.logit_scale,
                excluded=excluded,
            )
            rate = min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / total))
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * rate
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    return Pair(*image_scale.unfold(image_layer), *text_scale.unfold(text_layer))


def stack_pairs(pairs: list[Pair]) -> Pair:
    """Return one pair whose similarity is the mean of the given ones' (nearly: before L2)."""
    return Pair(
        torch.cat([pair.image_weight for pair in pairs]),
        torch.cat([pair.image_bias for pair in pairs]),
        torch.cat([pair.text_weight for pair in pairs]),
        torch.cat([pair.text_bias for pair in pairs]),
    )


class _Scale:
    """Standardises vectors, and folds that into a layer afterwards."""

    def __init__(self, vectors: Tensor) -> None:
        flat = vectors.flatten(0, -2)
        self.mean, self.deviation = flat.mean(0), flat.std(0) + 1e-4

    def __call__(self, vectors: Tensor) -> Tensor:
        return (vectors - self.mean) / self.deviation

    def unfold(self, layer: nn.Linear) -> tuple[Tensor, Tensor]:
        """Return weight and bias that take raw vectors."""
        weight = layer.weight.detach() / self.deviation
        return weight, layer.bias.detach() - weight @ self.mean


def _draw(vectors: Tensor, chosen: Tensor, dropout: float, generator: torch.Generator) -> Tensor:
    """Pick one of the views of each chosen pair and drop some of its numbers."""
    view = torch.randint(vectors.shape[0], (len(chosen),), generator=generator)
    picked = vectors[view, chosen]
    kept = torch.rand(picked.shape, generator=generator) >= dropout
    return picked * kept / (1 - dropout)


BATCH_TOKENS = 2048
MAX_TEXT_TOKENS = 256
CLASSES = "imagenet-classes"  # names without pictures: their features are made
UNMIRRORED = frozenset({"vqa-rad", "nlvr", "easy-vqa"})  # left and right matter


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
            found = fit_start(run, stage) if isinstance(stage, WordsStage) else fit_head(run, stage)
            with write_atomically(path) as temporary:
                save_file({name: tensor.contiguous() for name, tensor in found.items()}, temporary)
    unknown = run.loaded.vlm.load_state_dict(found, strict=False).unexpected_keys
    assert not unknown, unknown


def fit_start(run: TrainingRun, stage: WordsStage) -> dict[str, Tensor]:
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


def fit_head(run: TrainingRun, stage: HeadStage) -> dict[str, Tensor]:
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
def text_states(run: TrainingRun, texts: Sequence[str]) -> Tensor:
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
    *,
    flip: bool = False,
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


def make_class_features(run: TrainingRun) -> None:
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


def _made(
    run: TrainingRun, store: FeatureStore, others: Sequence[str], num: int, seed: int
) -> np.ndarray:
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
