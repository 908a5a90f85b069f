"""A TinyLLaVA folder, loaded whole: what one training stage wrote, or a repository of the hub.

    config.json  weights  tokenizer                           a repository, of either generation
    config.json  language_model/  vision_tower/  connector/   a stage: each part's own weights
    the same with adapter_config.json and its weights         a LoRA stage: merged here

Which it is, the files say. Executes nothing and fetches nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from visavis.checkpoints.adapters import CONFIG_NAME as ADAPTER
from visavis.checkpoints.adapters import is_adapter, merged, read_adapter
from visavis.checkpoints.checkpoint import Checkpoint, Written
from visavis.checkpoints.checkpoint_format import (
    CONFIG,
    NO_TEMPLATE,
    Candidate,
    Companions,
    DetectedFormat,
    FolderFormat,
    adapter_files,
    outermost,
    refuse_quantised,
)
from visavis.checkpoints.tensor_files import (
    StoredTensor,
    TensorFiles,
    read_headers,
    read_json,
    weight_files,
)
from visavis.checkpoints.tinyllava.config import (
    DINOV2_PIXELS,
    OLD_CLASSES,
    OLD_PLACES,
    PLACES,
    PROCESSOR,
    TURNS_SETTING,
    Places,
    image_processor,
    is_old,
    modern,
    name_table,
    text_config,
    turns_of,
    vision_configs,
    vlm_config,
)
from visavis.checkpoints.tinyllava.export import write_tinyllava
from visavis.checkpoints.transformers.config_reader import Json, require
from visavis.checkpoints.transformers.processor import processor_config
from visavis.checkpoints.transformers.vision_models import vit_config
from visavis.errors import CheckpointError
from visavis.model.config import VLMConfig
from visavis.model.vision.vit import resize_positions
from visavis.processing.chat_formats import CHAT_FORMATS
from visavis.processing.config import ImageProcessorConfig
from visavis.processing.prompt_config import PromptConfig
from visavis.processing.tokenizer import SpecialTokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PARTS = {  # folders of a stage -> where their tensors' names hang in a repository
    "language_model": "language_model.",
    "vision_tower": "vision_tower._vision_tower.",
    "connector": "connector.",
}
POSITIONS = "embeddings.position_embeddings"  # of a DINOv2


@dataclass(kw_only=True)
class TinyLlavaFormat(FolderFormat):
    """The output folder of one TinyLLaVA stage, or a repository of either generation.

    Attributes:
        chat_template: the chat format; empty if nothing settles it.
    """

    kind = "tinyllava"
    title = "TinyLLaVA"
    model_types = ("tinyllava",)
    target = "tinyllava"

    chat_template: str

    @classmethod
    def matches(cls, candidate: Candidate) -> DetectedFormat | None:
        if str(candidate.architecture) in OLD_CLASSES and not candidate.has(ADAPTER):
            why = f"{CONFIG} has architectures [{candidate.architecture!r}]"
            return cls.found(candidate, why, CONFIG)
        found = super().matches(candidate)
        if found is not None and candidate.has(ADAPTER):
            return cls.found(candidate, f"{found.why}, beside {ADAPTER}", CONFIG, ADAPTER)
        return found

    @classmethod
    def open(cls, detected: DetectedFormat, companions: Companions) -> Self:
        folder = detected.path
        if is_adapter(folder):
            adapters = (read_adapter(folder), *companions.adapters)
            companions = replace(companions, adapters=adapters)
        settings = _settings(folder)
        config, processor = settings.config, settings.processor
        table = name_table(settings.text, settings.visions, config, settings.places)
        entries, files, is_stage = _tensors(folder)
        _fit(entries, settings.visions, processor.size, settings.places)
        if settings.is_old and config.decoder.head_bias and "lm_head.weight" in entries:
            # the older Phi's output layer has none, and nothing says so
            rows = entries["lm_head.weight"].shape[:1]
            zeros = StoredTensor(torch.float32, rows, partial(torch.zeros, rows))
            entries.setdefault("lm_head.bias", zeros)
        captions = is_stage and not is_adapter(folder)
        chat_template = _turns(settings.data, settings.text, captions=captions)
        return cls(
            detected=detected,
            companions=companions,
            name=outermost(folder, companions.adapters).resolve().name,
            settings=settings.data,
            config=config,
            processor=processor,
            table=table,
            weights=merged(TensorFiles(entries), companions.adapters, table.canonical),
            files=[folder / CONFIG, *files, *adapter_files(companions.adapters)],
            facts={
                "architecture": str(settings.data.get("model_type")),
                "language model": str(settings.text["model_type"]),
                "chat template": chat_template or NO_TEMPLATE,
            },
            identity={"config": settings.data, "processor": processor.to_dict()},
            chat_template=chat_template,
        )

    @classmethod
    def read_config(cls, path: Path) -> tuple[VLMConfig, ImageProcessorConfig | None]:
        settings = _settings(path)
        return settings.config, settings.processor

    @classmethod
    def save(
        cls, checkpoint: Checkpoint, folder: Path, *, kind: str = "", progress: bool = False
    ) -> Written:
        return write_tinyllava(checkpoint, folder, progress=progress)

    def prompt_config(self, tokenizer: Tokenizer, specials: SpecialTokens) -> PromptConfig:
        return PromptConfig(chat_template=self.chat_template)


@dataclass(frozen=True)
class _Settings:
    """A folder's settings, read.

    Attributes:
        data: config.json, an older repository's as the Factory would have it.
    """

    data: Json
    is_old: bool
    text: Json
    visions: Sequence[Json]
    config: VLMConfig
    processor: ImageProcessorConfig

    @property
    def places(self) -> Places:
        return OLD_PLACES if self.is_old else PLACES


def _settings(folder: Path) -> _Settings:
    data: Json = read_json(folder / CONFIG)
    refuse_quantised(data, folder)
    old = is_old(data)
    if old:
        data = modern(data)
    text, visions = text_config(data), vision_configs(data)
    processor = _processor(folder, data, visions[0])
    config = vlm_config(data, text, visions, processor.size)
    return _Settings(data, old, text, visions, config, processor)


def _tensors(folder: Path) -> tuple[dict[str, StoredTensor], list[Path], bool]:
    """Return a folder's tensors by a repository's names, their files, and whether each part had
    a folder of its own."""
    if not any((folder / part).is_dir() for part in PARTS):
        files = weight_files(folder)
        return dict(read_headers(files)), files, False
    absent = [part for part in PARTS if not (folder / part).is_dir()]
    if absent:
        raise CheckpointError(
            f"{folder} lacks the folder {', '.join(absent)}, expected {', '.join(PARTS)} beside "
            "one another, as TinyLLaVA writes them; copy what is missing."
        )
    entries: dict[str, StoredTensor] = {}
    files = []
    for part, prefix in PARTS.items():
        own = weight_files(folder / part)
        files += own
        for name, stored in read_headers(own).items():  # a LoRA stage's linears are wrapped
            entries[prefix + name.replace(".base_layer.", ".")] = stored
    return entries, files, True


def _processor(folder: Path, data: Json, vision: Json) -> ImageProcessorConfig:
    """Return how images are sized and normalised: the first tower's own way."""
    dino = str(vision["model_type"]).startswith("dinov2")
    size = DINOV2_PIXELS if dino else vit_config(vision).image_size
    path = folder / PROCESSOR
    found = read_json(path) if path.is_file() else image_processor(vision, size)
    processor = processor_config(found)
    if not dino and processor.size != size:
        raise CheckpointError(
            f"{path} prepares pictures of {processor.size} pixels, but the vision tower takes "
            f"{size}; it belongs to another model."
        )
    if data.get("image_aspect_ratio") != "pad" or processor.resize == "pad":
        return processor
    whole = processor.crop_fraction == 1
    require("crop_size", processor.size, whole, "the shortest edge, for padded pictures")
    return replace(processor, resize="pad")


def _fit(
    entries: dict[str, StoredTensor], visions: Sequence[Json], size: int, places: Places
) -> None:
    """Bring a DINOv2's learned positions to the size of the images, in place.

    The original does so for every image.
    """
    for vision in visions:
        if not vision["model_type"].startswith("dinov2"):
            continue
        tower = vit_config(vision)
        grid = size // tower.patch_size
        name = places.tower + ("dinov2." if len(visions) == 2 else "") + POSITIONS
        stored = entries.get(name)
        if stored is not None and stored.shape == (1, 1 + tower.grid**2, tower.width):
            shape = (1, 1 + grid**2, tower.width)
            entries[name] = StoredTensor(stored.dtype, shape, partial(_resized, stored, grid))


def _resized(stored: StoredTensor, grid: int) -> Tensor:
    positions = stored()[0]
    patches = resize_positions(positions[1:], grid, antialias=False)
    return torch.cat((positions[:1], patches))[None]


def _turns(data: Json, text: Json, *, captions: bool) -> str:
    """Return the chat format. A stage may have seen captions only: what it was, no file says."""
    named = data.get(TURNS_SETTING)
    if isinstance(named, str) and (named in CHAT_FORMATS or not named):
        return named
    return "" if captions else turns_of(data, text)
