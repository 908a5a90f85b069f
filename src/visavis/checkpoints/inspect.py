"""What a checkpoint is, read from its settings and headers alone; no weight is read.

    detect ──► one opener per layout ──► Description: config, tensors, files, profile, problems

Each opener finds the parts as the layout's loader does. Knows no terminal (see cli/inspect.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from visavis.checkpoints import bundled
from visavis.checkpoints.adapters import Adapter, read_adapter
from visavis.checkpoints.detect import ADAPTER, CONFIG, NATIVE, PROJECTOR, DetectedFormat, detect
from visavis.checkpoints.gguf.decoder import decoder_config, decoder_tensors
from visavis.checkpoints.gguf.load import find_parts, open_model
from visavis.checkpoints.gguf.mmproj import read_half
from visavis.checkpoints.gguf.reader import GGUFFile, open_gguf
from visavis.checkpoints.llava.load import open_llava
from visavis.checkpoints.native import PACKED, read_config, read_settings
from visavis.checkpoints.phi3v import open_phi3v
from visavis.checkpoints.tensor_files import (
    Shape,
    StoredTensor,
    TensorFiles,
    read_headers,
    read_json,
    read_tensors,
    weight_files,
)
from visavis.checkpoints.tinyllava.load import open_tinyllava
from visavis.checkpoints.transformers.load import chat_template, image_processor, refuse_quantised
from visavis.checkpoints.transformers.vision_models import vlm_config
from visavis.checkpoints.transformers.weights import read_as, vlm_table
from visavis.checkpoints.weight_mapping import NameTable
from visavis.errors import CheckpointError
from visavis.model.config import VLMConfig
from visavis.model.vlm import VLM
from visavis.processing.images import ImageProcessorConfig

PARTS = {  # attributes of a VLM
    "tower": "vision tower",
    "connector": "connector",
    "decoder": "language model",
    "head": "embedding head",
}
IN_FOLDER, NO_TEMPLATE = "in the folder", "none, name one of visavis' turns"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor, by what its header says."""

    type: str  # torch's name, or GGML's
    shape: Shape
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Description:
    """A checkpoint that was opened and not loaded.

    Attributes:
        settings: its settings as it writes them, for comparing two of a layout.
        config: the model; None for what is only a part of one.
        tensors: by the layout's names.
        profile: facts on how it is asked, for people.
        table: what the layout calls our tensors; None where the names are in no table.
        problems: why it does not load as it is.
    """

    layout: DetectedFormat
    name: str
    settings: Mapping[str, Any]
    config: VLMConfig | None
    tensors: dict[str, TensorEntry]
    files: list[Path]
    profile: dict[str, str] = field(default_factory=dict)
    processor: ImageProcessorConfig | None = None
    table: NameTable | None = None
    problems: list[str] = field(default_factory=list)
    details: str = ""  # of a part

    def parts(self) -> list[dict[str, Any]]:
        """Return each part's name, number of parameters and measures."""
        if self.config is not None:
            return model_parts(self.config)
        count = sum(math.prod(entry.shape) for entry in self.tensors.values())
        return [{"part": self.layout.title, "parameters": count, "details": self.details}]


def describe(path: Path) -> Description:
    """Open a checkpoint and return what it is.

    Raises:
        CheckpointError: it is damaged, or in no layout that is known.
    """
    layout = detect(path)
    return OPENERS[layout.kind](layout)


class _Opened(Protocol):
    """What the layouts' own `open_…` return."""

    @property
    def data(self) -> Mapping[str, Any]: ...
    @property
    def config(self) -> VLMConfig: ...
    @property
    def processor(self) -> ImageProcessorConfig: ...
    @property
    def tensors(self) -> TensorFiles: ...
    @property
    def table(self) -> NameTable: ...
    @property
    def files(self) -> list[Path]: ...


def _folder(layout: DetectedFormat, found: _Opened, **profile: str) -> Description:
    """Describe a folder that its layout's own function has opened."""
    return Description(
        layout=layout,
        name=layout.path.resolve().name,
        settings=found.data,
        config=found.config,
        tensors=_entries(found.tensors.entries),
        files=[layout.path / CONFIG, *found.files],
        profile={"architecture": str(found.data.get("model_type")), **profile},
        processor=found.processor,
        table=found.table,
        problems=_problems(found.config, found.table, found.tensors, layout.path),
    )


def _transformers(layout: DetectedFormat) -> Description:
    path = layout.path
    data = read_json(path / CONFIG)
    refuse_quantised(data, path)
    config, files = vlm_config(data), weight_files(path)
    tensors, table = read_tensors(files), vlm_table(data, config)
    return Description(
        layout=layout,
        name=path.resolve().name,
        settings=data,
        config=config,
        tensors=_entries(tensors.entries),
        files=[path / CONFIG, *files],
        profile={
            "architecture": str(data["model_type"]),
            "chat template": IN_FOLDER if chat_template(path) else "none",
        },
        processor=image_processor(config, path),
        table=table,
        problems=_problems(config, table, tensors, path),
    )


def _llava(layout: DetectedFormat) -> Description:
    found = open_llava(layout.path)
    template = IN_FOLDER if chat_template(layout.path) else NO_TEMPLATE
    described = _folder(
        layout,
        found,
        **{
            "architecture": str(found.text["model_type"]),
            "vision tower": str(found.data["mm_vision_tower"]),
            "chat template": found.chat_template or template,
        },
    )
    if found.lacking is None:
        return described
    return dataclasses.replace(described, problems=[str(found.lacking)])


def _llava_first_stage(layout: DetectedFormat) -> Description:
    """Describe a projector; the language model is the caller's to name when it is loaded."""
    path = layout.path
    data = read_json(path / CONFIG)
    return Description(
        layout=layout,
        name=path.resolve().name,
        settings=data,
        config=None,
        tensors=_entries(read_headers([path / PROJECTOR])),
        files=[path / CONFIG, path / PROJECTOR],
        profile={
            "base": str(data.get("_name_or_path", "not named")),
            "vision tower": str(data["mm_vision_tower"]),
        },
        problems=["it holds a projector alone: load it with base='…', its language model"],
        details=str(data.get("mm_projector_type", "linear")),
    )


def _tinyllava(layout: DetectedFormat) -> Description:
    found = open_tinyllava(layout.path)
    profile = {"language model": str(found.text["model_type"])}
    return _folder(
        layout, found, **profile, **{"chat template": found.chat_template or NO_TEMPLATE}
    )


def _phi3v(layout: DetectedFormat) -> Description:
    return _folder(layout, open_phi3v(layout.path), **{"chat template": "phi3_v"})


def _adapter(layout: DetectedFormat) -> Description:
    adapter = read_adapter(layout.path)
    pairs = adapter.low_rank
    ranks = ", ".join(map(str, sorted({pair.a.shape[0] for pair in pairs.values()})))
    return Description(
        layout=layout,
        name=layout.path.resolve().name,
        settings=adapter.config,
        config=None,
        tensors=_entries(_adapter_tensors(adapter)),
        files=[layout.path / ADAPTER, *adapter.files],
        profile={
            "base": str(adapter.config.get("base_model_name_or_path", "not named")),
            "kind": "DoRA" if adapter.config.get("use_dora") else "LoRA",
        },
        details=f"rank {ranks} on {len(pairs)} matrices, {len(adapter.replaced)} tensors whole",
    )


def _adapter_tensors(adapter: Adapter) -> dict[str, StoredTensor]:
    found = dict(adapter.replaced)
    for name, pair in adapter.low_rank.items():
        module = name.removesuffix(".weight")
        parts = {"lora_A": pair.a, "lora_B": pair.b, "lora_magnitude_vector": pair.magnitude}
        found |= {f"{module}.{part}": one for part, one in parts.items() if one is not None}
    return found


def _gguf(layout: DetectedFormat) -> Description:
    path, half = layout.path, None
    if path.is_dir():
        path, half = find_parts(path)
    file, files = open_model(path)
    config, processor = VLMConfig(decoder=decoder_config(file)), None
    tensors = _blocks(file)
    if half is not None:
        vision = open_gguf(half)
        found = read_half(vision)
        config, processor = found.joined(config, 0), found.processor
        tensors |= _blocks(vision)
        files = [*files, half]
    problems = []
    try:
        next(decoder_tensors(file))  # names and shapes are checked before the first
    except CheckpointError as error:
        problems = [str(error)]
    has_template = "tokenizer.chat_template" in file.metadata
    return Description(
        layout=layout,
        name=str(file.metadata.get("general.name", path.stem)),
        settings=_plain(file),
        config=config,
        tensors=tensors,
        files=files,
        profile={
            "architecture": str(file.metadata.get("general.architecture", "unknown")),
            "chat template": "in the file" if has_template else "none",
        },
        processor=processor,
        problems=problems,
    )


def _mmproj(layout: DetectedFormat) -> Description:
    file = open_gguf(layout.path)
    found = read_half(file)
    return Description(
        layout=layout,
        name=str(file.metadata.get("general.name", layout.path.stem)),
        settings=_plain(file),
        config=None,
        tensors=_blocks(file),
        files=[layout.path],
        processor=found.processor,
        problems=["it holds the vision half alone: give it as vision_tower='…' with its model"],
        details=(
            f"{found.tower.kind}, {found.tower.image_size} px; {found.connector.kind} to width "
            f"{found.connector.out_width}"
        ),
    )


def _blocks(file: GGUFFile) -> dict[str, TensorEntry]:
    def read(name: str) -> Tensor:
        return torch.from_numpy(file.dequantize(name))

    return {
        name: TensorEntry(info.type, info.shape, partial(read, name))
        for name, info in file.tensors.items()
    }


def _plain(file: GGUFFile) -> dict[str, Any]:
    """Return a GGUF file's metadata as JSON has it."""
    return {
        key: value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in file.metadata.items()
        if not key.startswith("split.")
    }


def _native(layout: DetectedFormat) -> Description:
    path = layout.path
    data = read_config(path)
    config, _, processor = read_settings(path, data)
    files = sorted(path.glob("*.safetensors"))
    headers = read_headers(files)
    problems = []
    if "bundle" not in data:
        expected = meta_state(config)
        if config.decoder.tied_head:
            expected.pop("decoder.head.weight")
        whole = [match[1] if (match := PACKED.fullmatch(name)) else name for name in headers]
        problems = [f"missing {name}" for name in expected if name not in whole]
        problems += [f"unexpected {name}" for name in whole if name not in expected]
    return Description(
        layout=layout,
        name=str(data["name"]),
        settings={key: value for key, value in data.items() if key != "name"},
        config=config,
        tensors=_entries(headers),
        files=[path / NATIVE, *files, *bundle_files(data)],
        profile={key: str(value) for key, value in data["profile"].items() if value},
        processor=processor,
        problems=problems,
    )


def bundle_files(data: Mapping[str, Any]) -> list[Path]:
    """Return where the files that a folder stands on are kept, whether they are there or not."""
    if "bundle" not in data:
        return []
    wheels = bundled.BUNDLED[data["bundle"]].values()
    return [bundled.cache_dir() / data["bundle"] / wheel.file_name for wheel in wheels]


OPENERS: dict[str, Callable[[DetectedFormat], Description]] = {  # by kinds of `detect.py`
    "native": _native,
    "adapter": _adapter,
    "gguf": _gguf,
    "mmproj": _mmproj,
    "transformers": _transformers,
    "llava_next": _transformers,
    "llava_onevision": _transformers,
    "qwen2_vl": _transformers,
    "phi3_v": _phi3v,
    "llava_original": _llava,
    "llava_first_stage": _llava_first_stage,
    "tinyllava": _tinyllava,
}


def _entries(stored: Mapping[str, StoredTensor]) -> dict[str, TensorEntry]:
    return {
        name: TensorEntry(str(one.dtype).removeprefix("torch."), one.shape, one.read)
        for name, one in stored.items()
    }


def _problems(config: VLMConfig, table: NameTable, tensors: TensorFiles, path: Path) -> list[str]:
    """Return what keeps the tensors from fitting the config, found by names and shapes alone."""
    shapes = {
        name: torch.empty(stored.shape, dtype=stored.dtype, device="meta")
        for name, stored in tensors.entries.items()
    }
    if config.decoder.tied_head:  # a head of its own is compared by value when it is loaded
        shapes = {name: t for name, t in shapes.items() if not name.endswith("lm_head.weight")}
    try:
        read_as(config, table, shapes, where=str(path))
    except CheckpointError as error:
        return [str(error)]
    return []


def meta_state(config: VLMConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return VLM(config).state_dict()


def model_parts(config: VLMConfig) -> list[dict[str, Any]]:
    """Count each part's parameters on torch's meta device, which holds no numbers."""
    with torch.device("meta"):
        vlm = VLM(config)
    decoder, tower, connector, head = config.decoder, config.tower, config.connector, config.head
    details = {
        "decoder": (
            f"{decoder.num_layers} layers × {decoder.width}, vocabulary {decoder.vocab_size}, "
            f"context {decoder.context_length}"
        )
    }
    if tower:
        size = getattr(tower, "image_size", 0)
        details["tower"] = f"{tower.kind}, {f'{size} px' if size else 'any size'}"
    if connector:
        details["connector"] = connector.kind
        if hasattr(tower, "image_size"):
            details["connector"] += f", {config.tokens_per_image} tokens per view"
    if head:
        details["head"] = f"{head.dim} dimensions from layers {head.layers}"
    found = []
    for attribute, name in PARTS.items():
        if (module := getattr(vlm, attribute)) is not None:
            unique = {id(p): p.numel() for p in module.parameters()}
            found.append(
                {"part": name, "parameters": sum(unique.values()), "details": details[attribute]}
            )
    return found
