"""A GGUF file, or a folder of a language model and its vision half (mmproj), opened and loaded.

A model in several parts counts as one. Tokenizer and chat template are in the metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from visavis.checkpoints.checkpoint import Checkpoint, Written, checkpoint_fingerprint
from visavis.checkpoints.checkpoint_format import (
    CONFIG,
    Candidate,
    CheckpointFormat,
    Companions,
    DetectedFormat,
    TensorEntry,
)
from visavis.checkpoints.gguf.architectures import POOLING, PROFILE
from visavis.checkpoints.gguf.decoder import check_types, decoder_config, decoder_tensors
from visavis.checkpoints.gguf.export import write_gguf
from visavis.checkpoints.gguf.mmproj import ARCHITECTURE, MmprojModel, half_state, read_half
from visavis.checkpoints.gguf.reader import GGUFFile, open_gguf, open_model
from visavis.checkpoints.gguf.repack import take_blocks
from visavis.checkpoints.quantize import LowRank, Quantizer
from visavis.checkpoints.transformers.config_reader import Json
from visavis.errors import CheckpointError
from visavis.model.config import VLMConfig
from visavis.processing.prompt_config import PromptConfig
from visavis.processing.tokenizer import SpecialTokens, build_tokenizer, special_tokens
from visavis.utils import parse_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNPOOLED = 0  # llama.cpp's number of no pooling
PLACEHOLDER = "<image>"  # what vocabularies call it that have one
TOKENS = "tokenizer.ggml.tokens"
MAX_LISTED = 5


@dataclass(kw_only=True)
class GGUFFormat(CheckpointFormat):
    """A language model in GGUF, alone or with its vision half."""

    kind = "gguf"
    title = "GGUF"
    takes = ("vision_tower",)
    target = "gguf"
    peer = "xllamacpp"
    library = "gguf"
    has_gguf_types = True

    file: GGUFFile
    vision: GGUFFile | None
    half: MmprojModel | None

    @classmethod
    def matches(cls, candidate: Candidate) -> DetectedFormat | None:
        metadata = candidate.gguf
        if metadata is not None:
            why = f"a GGUF file with general.architecture {_architecture(metadata)!r}"
            if "split.count" in metadata:
                why += f", one of {metadata['split.count']} parts"
            return cls.found(candidate, why)
        names = sorted(path.name for path in candidate.path.glob("*.gguf"))
        if not names or candidate.has(CONFIG):
            return None
        return cls.found(candidate, f"it has {names[0]} and no {CONFIG}", *names)

    @classmethod
    def open(cls, detected: DetectedFormat, companions: Companions) -> Self:
        path, vision_path = detected.path, companions.vision_tower
        if path.is_dir():
            path, found = find_parts(path)
            vision_path = vision_path or found
        file, files = open_model(path)
        config = VLMConfig(decoder=decoder_config(file))
        half = vision = None
        if vision_path is not None:
            vision, half = _open_half(vision_path, config.decoder.width, path)
            config = half.joined(config, _placeholder(file.metadata))
            files = [*files, vision_path]
        has_template = "tokenizer.chat_template" in file.metadata
        return cls(
            detected=detected,
            companions=companions,
            name=str(file.metadata.get("general.name", path.stem)),
            settings=_settings(file),
            config=config,
            processor=None if half is None else half.processor,
            tensors=_blocks(file) | ({} if vision is None else _blocks(vision)),
            files=files,
            facts={
                "architecture": str(file.metadata.get("general.architecture", "unknown")),
                "chat template": "in the file" if has_template else "none",
            },
            file=file,
            vision=vision,
            half=half,
        )

    @classmethod
    def save(
        cls, checkpoint: Checkpoint, folder: Path, *, kind: str = "", progress: bool = False
    ) -> Written:
        return Written(write_gguf(checkpoint, folder, kind=kind))

    def tokenizer(self) -> tuple[Tokenizer, SpecialTokens]:
        metadata = self.file.metadata
        return build_tokenizer(metadata), special_tokens(metadata)

    def prompt_config(self, tokenizer: Tokenizer, specials: SpecialTokens) -> PromptConfig:
        return _prompt_config(self.file)

    def state(self, quantizer: Quantizer) -> tuple[dict[str, Tensor], LowRank | None]:
        file = self.file
        check_types(file)
        state = {n: take_blocks(quantizer, file, n, stored) for n, stored in decoder_tensors(file)}
        if self.vision is not None and self.half is not None:
            for name, tensor in half_state(self.vision, self.half):
                state[name] = quantizer.take(name, tensor)
        return state, None

    def fingerprint(self, quantizer: Quantizer) -> str:
        return checkpoint_fingerprint(self.files, {"precision": quantizer.regime})

    def misfits(self) -> list[str]:
        try:
            next(decoder_tensors(self.file))  # names and shapes are checked before the first
        except CheckpointError as error:
            return [str(error)]
        return []


@dataclass(kw_only=True)
class MmprojFormat(CheckpointFormat):
    """The vision half of a model, which is loaded with its language model."""

    kind = "mmproj"
    title = "GGUF vision projector"
    takes = ("vision_tower",)

    @classmethod
    def matches(cls, candidate: Candidate) -> DetectedFormat | None:
        if candidate.gguf is None or _architecture(candidate.gguf) != ARCHITECTURE:
            return None
        return cls.found(candidate, f"a GGUF file with general.architecture {ARCHITECTURE!r}")

    @classmethod
    def open(cls, detected: DetectedFormat, companions: Companions) -> Self:
        path, file = detected.path, open_gguf(detected.path)
        half = read_half(file)
        return cls(
            detected=detected,
            companions=companions,
            name=str(file.metadata.get("general.name", path.stem)),
            settings=_settings(file),
            config=None,
            processor=half.processor,
            tensors=_blocks(file),
            files=[path],
            lacking=(
                f"{path} is the vision half of a model (mmproj), expected its language model; give "
                "that, and this file with it: visavis.load('model.gguf', "
                f"vision_tower={str(path)!r})."
            ),
            details=(
                f"{half.tower.kind}, {half.tower.image_size} px; {half.connector.kind} to width "
                f"{half.connector.out_width}"
            ),
        )


def _architecture(metadata: Mapping[str, Any]) -> str:
    return str(metadata.get("general.architecture"))


def _placeholder(metadata: Mapping[str, Any]) -> int:
    """Return the id of the image placeholder. Without one in the vocabulary any id will do: images
    are found by position."""
    if TOKENS not in metadata:
        return 0
    return special_tokens(metadata).by_text.get(PLACEHOLDER, 0)


def _blocks(file: GGUFFile) -> dict[str, TensorEntry]:
    def read(name: str) -> Tensor:
        return torch.from_numpy(file.dequantize(name))

    return {
        name: TensorEntry(info.type, info.shape, partial(read, name))
        for name, info in file.tensors.items()
    }


def _settings(file: GGUFFile) -> Json:
    """Return a GGUF file's metadata as JSON has it."""
    return {
        key: value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in file.metadata.items()
        if not key.startswith("split.")
    }


def find_parts(folder: Path) -> tuple[Path, Path | None]:
    """Return the language model of a folder, and its vision half if there is one.

    Raises:
        CheckpointError: several that could be meant, or no language model.
    """
    models, halves = [], []
    for path in sorted(folder.glob("*.gguf")):
        metadata = open_gguf(path).metadata
        if str(metadata.get("general.architecture")) == ARCHITECTURE:
            halves.append(path)
        elif metadata.get("split.no", 0) == 0:
            models.append(path)
    if len(models) != 1 or len(halves) > 1:
        listed = ", ".join(path.name for path in (*models, *halves)[:MAX_LISTED]) or "none"
        raise CheckpointError(
            f"{folder} holds {len(models)} language models and {len(halves)} vision halves in GGUF "
            f"({listed}), expected one and at most one; name the files: "
            "visavis.load('model.gguf', vision_tower='mmproj.gguf')."
        )
    return models[0], halves[0] if halves else None


def _open_half(path: Path, width: int, model: Path) -> tuple[GGUFFile, MmprojModel]:
    file = open_gguf(path)
    architecture = str(file.metadata.get("general.architecture"))
    if architecture != ARCHITECTURE:
        raise CheckpointError(
            f"{path} has general.architecture {architecture!r}, expected {ARCHITECTURE!r}, the "
            "vision half of a model (mmproj); give the language model first and this file's "
            "partner as vision_tower."
        )
    half = read_half(file)
    if half.connector.out_width != width:
        raise CheckpointError(
            f"{path} gives image tokens of width {half.connector.out_width}, but {model} is "
            f"{width} wide; the two belong to different models."
        )
    return file, half


def _prompt_config(file: GGUFFile) -> PromptConfig:
    """Return how to ask and to embed: as we wrote it, or what the file's own keys say."""
    metadata: Mapping[str, Any] = file.metadata
    own = metadata.get(PROFILE)
    if isinstance(own, str):
        try:
            return PromptConfig(**parse_json(own))
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{file.path}: {PROFILE} cannot be read ({error}); the file is damaged or from a "
                "newer visavis: upgrade it."
            ) from error
    key = f"{metadata['general.architecture']}.pooling_type"
    number = metadata.get(key, POOLING["last"])
    jinja = str(metadata.get("tokenizer.chat_template", ""))
    names: dict[object, Literal["mean", "first", "last"]] = {1: "mean", 2: "first", 3: "last"}
    if number == UNPOOLED and jinja:  # a model for chat
        number = POOLING["last"]
    if number not in names:
        kinds = {UNPOOLED: "none, a vector for each token", 4: "rank, a score"}
        raise CheckpointError(
            f"{file.path}: {key} is {number!r} ({kinds.get(number, 'not known')}), expected "
            f"{', '.join(f'{n} ({name})' for name, n in POOLING.items())}: the model gives no one "
            "vector for a text. Use an embedding model."
        )
    return PromptConfig(jinja=jinja, pooling=names[number])
