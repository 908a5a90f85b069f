"""The base class of checkpoint formats: how one is recognised, opened, read and written.

A format is one subclass, beside the code that knows it; `formats.py` lists them all. `load`,
`inspect`, `compare`, `convert` and the dry run of a recipe work with any of them through this
class.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from visavis.checkpoints.adapters import Adapter
from visavis.checkpoints.checkpoint import Checkpoint, Written, checkpoint_fingerprint
from visavis.checkpoints.gguf.reader import open_gguf
from visavis.checkpoints.quantize import LowRank, Quantizer
from visavis.checkpoints.tensor_files import Shape, StoredTensor, TensorFiles, read_json
from visavis.checkpoints.transformers.config_reader import Json
from visavis.checkpoints.transformers.weights import read_as
from visavis.checkpoints.weight_mapping import NameTable
from visavis.errors import CheckpointError
from visavis.model.config import VLMConfig
from visavis.processing.config import ImageProcessorConfig
from visavis.processing.prompt_config import PromptConfig
from visavis.processing.tokenizer import (
    SpecialTokens,
    has_tokenizer,
    load_tokenizer,
    tokenizer_file,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONFIG = "config.json"
NO_TEMPLATE = "none: name one with --chat-template"


@dataclass(frozen=True)
class Companions:
    """Files and options that are opened together with a checkpoint.

    Attributes:
        base: folder of the language model, for a first stage of LLaVA and for LLaVA's adapters.
        adapters: LoRA adapters that are merged while weights are read, the innermost first.
        vision_tower: folder or GGUF file of the vision tower.
        fetch: weights that are needed and not on this machine may be downloaded.
    """

    base: Path | None = None
    adapters: tuple[Adapter, ...] = ()
    vision_tower: Path | None = None
    fetch: bool = False


class Candidate:
    """A file or folder whose format is to be found.

    Args:
        config_only: detect the format from config.json alone and ignore all other files.
    """

    def __init__(self, path: Path, *, config_only: bool = False) -> None:
        self.path = path
        self.config_only = config_only

    def has(self, name: str) -> bool:
        """Return whether a folder holds a file that may decide."""
        return (name == CONFIG or not self.config_only) and (self.path / name).is_file()

    @cached_property
    def config(self) -> Json:
        """config.json; empty if there is none."""
        return read_json(self.path / CONFIG) if self.has(CONFIG) else {}

    @property
    def architecture(self) -> object:
        """The first of the `architectures` in config.json."""
        classes = self.config.get("architectures")
        return classes[0] if isinstance(classes, list) and classes else None

    @cached_property
    def gguf(self) -> Mapping[str, Any] | None:
        """Metadata of a single GGUF file; None for a folder."""
        return None if self.path.is_dir() else open_gguf(self.path).metadata


@dataclass(frozen=True)
class DetectedFormat:
    """The format of a path.

    Attributes:
        why: the file and the key that decided, for people.
        files: the files that were looked at.
    """

    format: type[CheckpointFormat]
    path: Path
    why: str
    files: tuple[Path, ...]

    @property
    def kind(self) -> str:
        return self.format.kind

    @property
    def title(self) -> str:
        return self.format.title

    def open(self, companions: Companions | None = None) -> CheckpointFormat:
        """Open the checkpoint; see `CheckpointFormat.open`."""
        return self.format.open(self, companions or Companions())


@dataclass(frozen=True)
class TensorEntry:
    """One tensor, by what its header says."""

    type: str  # torch's name, or GGML's
    shape: Shape
    read: Callable[[], Tensor]


def tensor_entries(stored: Mapping[str, StoredTensor]) -> dict[str, TensorEntry]:
    """Return tensors of safetensors and PyTorch files as `CheckpointFormat.tensors` lists them."""
    return {
        name: TensorEntry(str(one.dtype).removeprefix("torch."), one.shape, one.read)
        for name, one in stored.items()
    }


@dataclass(kw_only=True)
class CheckpointFormat(ABC):
    """One format. The class recognises, opens and writes checkpoints; an instance is one checkpoint
    that was opened: settings and headers are read, and no tensor.

    Class attributes:
        kind: the format's name in code and JSON.
        title: its name for people.
        model_types: `model_type` of config.json, where that alone decides.
        takes: fields of `Companions` that it has a use for.
        target: its name in `visavis convert --to`; empty if it is not written.
        usage: Python code that opens a written folder; `{folder}` stands for its path.
        peer: Python package of the program that the format is of; empty: ours alone.
        library: the name of that program in a model card.
        has_gguf_types: it is written in one of GGUF's numeric types (`--kind`).
        holds_integers: it stores weights of `--precision int8` and `int4`.

    Attributes:
        settings: as the format writes them.
        config: the model; None for a checkpoint that is only a part of one.
        tensors: by the format's names.
        table: the format's names of our tensors; None where no table lists them.
        facts: for people, such as the architecture and the chat template.
        lacking: why it cannot be loaded as it is; empty if nothing is missing.
        details: of a part, for people.
    """

    kind: ClassVar[str]
    title: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar[tuple[str, ...]] = ()
    target: ClassVar[str] = ""
    usage: ClassVar[str] = 'import visavis\n\nmodel = visavis.load("{folder}")\n'
    peer: ClassVar[str] = ""
    library: ClassVar[str] = "visavis"
    has_gguf_types: ClassVar[bool] = False
    holds_integers: ClassVar[bool] = False

    detected: DetectedFormat
    companions: Companions
    name: str
    settings: Json
    config: VLMConfig | None
    processor: ImageProcessorConfig | None = None
    tensors: dict[str, TensorEntry]
    table: NameTable | None = None
    files: list[Path]
    facts: dict[str, str] = field(default_factory=dict)
    lacking: str = ""
    details: str = ""

    @property
    def path(self) -> Path:
        return self.detected.path

    @classmethod
    def matches(cls, candidate: Candidate) -> DetectedFormat | None:
        """Return why a path is of this format, None if it is not."""
        kind = candidate.config.get("model_type")
        if kind not in cls.model_types:
            return None
        return cls.found(candidate, f"{CONFIG} has model_type {kind!r}", CONFIG)

    @classmethod
    def found(cls, candidate: Candidate, why: str, *names: str) -> DetectedFormat:
        files = tuple(candidate.path / name for name in names) or (candidate.path,)
        return DetectedFormat(cls, candidate.path, why, files)

    @classmethod
    @abstractmethod
    def open(cls, detected: DetectedFormat, companions: Companions) -> Self:
        """Read settings and headers, find all files, and read no tensor.

        Raises:
            CheckpointError: a file is absent or damaged, or the files do not belong together.
            FetchError: weights that are needed cannot be downloaded.
        """

    @classmethod
    def read_config(cls, path: Path) -> tuple[VLMConfig, ImageProcessorConfig | None]:
        """Return the model of a folder's settings and how its images are prepared, from settings
        alone: no weights need be there.

        Raises:
            CheckpointError: settings are absent, or of no whole model.
        """
        raise CheckpointError(
            f"{path} is in the format {cls.title}, whose settings alone describe no model."
        )

    @classmethod
    def save(
        cls, checkpoint: Checkpoint, folder: Path, *, kind: str = "", progress: bool = False
    ) -> Written:
        """Write a loaded model in this format.

        Args:
            kind: type of the tensors, in formats with `has_gguf_types`.

        Raises:
            CheckpointError: the model has a part that the format does not have; nothing is written.
        """
        raise CheckpointError(f"checkpoints are not written in the format {cls.title}.")

    def tokenizer(self) -> tuple[Tokenizer, SpecialTokens]:
        """Return the tokenizer with its special tokens.

        Raises:
            CheckpointError: it is absent, or belongs to another model.
        """
        raise CheckpointError(self.lacking)

    def prompt_config(self, tokenizer: Tokenizer, specials: SpecialTokens) -> PromptConfig:
        """Return the chat format, and how items are embedded."""
        raise CheckpointError(self.lacking)

    def text_tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer of the text tower; None where the model has no text tower."""
        return None

    def state(self, quantizer: Quantizer) -> tuple[dict[str, Tensor], LowRank | None]:
        """Read all tensors by our names, and the low-rank pairs that are added to some of them.

        Raises:
            CheckpointError: tensors are missing, unexpected or of another shape.
        """
        raise CheckpointError(self.lacking)

    def fingerprint(self, quantizer: Quantizer) -> str:
        """Return 16 hex digits that change when weights, tokenizer or settings do."""
        return checkpoint_fingerprint(self.files, dict(self.settings))

    def misfits(self) -> list[str]:
        """Return why the tensors do not fit the config, by names and shapes alone."""
        return []

    @cached_property
    def problems(self) -> list[str]:
        """Why it does not load as it is."""
        return [self.lacking] if self.lacking else self.misfits()

    @property
    def num_parameters(self) -> int:
        """Number of stored values."""
        return sum(math.prod(entry.shape) for entry in self.tensors.values())


@dataclass(kw_only=True)
class FolderFormat(CheckpointFormat):
    """A folder with config.json, weights and a tokenizer, whose tensors a table names.

    Attributes:
        weights: tensors by the format's names, adapters merged.
        identity: settings that the fingerprint covers.
    """

    takes: ClassVar[tuple[str, ...]] = ("adapters",)

    tensors: dict[str, TensorEntry] = field(init=False)
    weights: TensorFiles
    identity: Json

    def __post_init__(self) -> None:
        self.tensors = tensor_entries(self.weights.entries)

    @property
    def tokenizer_folder(self) -> Path:
        """The folder that has the tokenizer: the outermost adapter's that brings one."""
        places = [adapter.folder for adapter in reversed(self.companions.adapters)]
        return next((place for place in places if has_tokenizer(place)), self.path)

    def tokenizer(self) -> tuple[Tokenizer, SpecialTokens]:
        if self.config is None:
            raise CheckpointError(self.lacking)
        folder = self.tokenizer_folder
        tokenizer, specials = load_tokenizer(folder)
        specials = self.special_tokens(tokenizer, specials, folder)
        largest = max(tokenizer.get_vocab().values(), default=0)
        if largest >= self.config.decoder.vocab_size:
            raise CheckpointError(
                f"the tokenizer of {folder} knows the id {largest}, but the embeddings of its "
                f"model have {self.config.decoder.vocab_size} rows; tokenizer.json belongs to "
                "another model."
            )
        return tokenizer, specials

    def special_tokens(
        self, tokenizer: Tokenizer, specials: SpecialTokens, folder: Path
    ) -> SpecialTokens:
        """Return the special tokens, with those that the model's own settings add.

        Raises:
            CheckpointError: the tokenizer does not have them.
        """
        return specials

    def state(self, quantizer: Quantizer) -> tuple[dict[str, Tensor], LowRank | None]:
        if self.config is None or self.table is None:
            raise CheckpointError(self.lacking)
        where, take = quantizer.where, quantizer.take
        return read_as(self.config, self.table, self.weights, where=where, convert=take), None

    def fingerprint(self, quantizer: Quantizer) -> str:
        adapters = [adapter.config for adapter in self.companions.adapters]
        files = [tokenizer_file(self.tokenizer_folder), *self.files[1:]]  # without config.json
        return checkpoint_fingerprint(files, {**self.identity, "adapters": adapters})

    def misfits(self) -> list[str]:
        if self.config is None or self.table is None:
            return []
        shapes = {
            name: torch.empty(stored.shape, dtype=stored.dtype, device="meta")
            for name, stored in self.weights.entries.items()
        }
        if self.config.decoder.tied_head:  # a head of its own is compared by value when loaded
            shapes = {name: t for name, t in shapes.items() if not name.endswith("lm_head.weight")}
        try:
            read_as(self.config, self.table, shapes, where=str(self.path))
        except CheckpointError as error:
            return [str(error)]
        return []


def outermost(path: Path, adapters: Sequence[Adapter]) -> Path:
    """Return the folder that a checkpoint is called after: its own, or its last adapter's."""
    return adapters[-1].folder if adapters else path


def adapter_files(adapters: Sequence[Adapter]) -> list[Path]:
    """Return the weight files of adapters."""
    return [file for adapter in adapters for file in adapter.files]


def refuse_quantised(data: Json, folder: Path) -> None:
    """Refuse weights that another library quantised; null and {} say that none did.

    Raises:
        CheckpointError: config.json says so.
    """
    if method := data.get("quantization_config"):
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise CheckpointError(
            f"{folder} is quantised by {method!r}, expected plain weights; use the unquantised "
            "checkpoint or a GGUF file."
        )
