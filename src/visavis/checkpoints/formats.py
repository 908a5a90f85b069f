"""All checkpoint formats: which one a path is in, and which are written.

Contents decide, never names: config.json and the headers of GGUF files are read, and no weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from visavis.checkpoints.adapters import CONFIG_NAME as ADAPTER
from visavis.checkpoints.adapters import Adapter, read_adapter
from visavis.checkpoints.checkpoint_format import (
    CONFIG,
    Candidate,
    CheckpointFormat,
    Companions,
    DetectedFormat,
    tensor_entries,
)
from visavis.checkpoints.gguf.load import GGUFFormat, MmprojFormat
from visavis.checkpoints.gguf.reader import MAGIC as GGUF_MAGIC
from visavis.checkpoints.llava.load import LlavaFirstStageFormat, LlavaFormat
from visavis.checkpoints.native import CONFIG_NAME as NATIVE
from visavis.checkpoints.native import NativeFormat
from visavis.checkpoints.phi3v import Phi3VFormat
from visavis.checkpoints.sentence_transformers import SentenceTransformersFormat
from visavis.checkpoints.tensor_files import StoredTensor
from visavis.checkpoints.tinyllava.load import TinyLlavaFormat
from visavis.checkpoints.transformers.load import (
    Idefics3Format,
    InternVLFormat,
    LlavaNextFormat,
    LlavaOnevision15Format,
    LlavaOnevisionFormat,
    MultiVectorFormat,
    Qwen2VLFormat,
    Qwen3VLFormat,
    Qwen25VLFormat,
    TransformersFormat,
)
from visavis.checkpoints.transformers.load_embedders import DualEncoderFormat, EmbeddingGemma2Format
from visavis.errors import CheckpointError
from visavis.utils import check_regular, suggest

MAX_LISTED = 8


@dataclass(kw_only=True)
class AdapterFormat(CheckpointFormat):
    """A LoRA adapter in PEFT's layout; it is loaded as a companion of its base."""

    kind = "adapter"
    title = "LoRA adapter"

    @classmethod
    def matches(cls, candidate: Candidate) -> DetectedFormat | None:
        return (
            cls.found(candidate, f"it has {ADAPTER}", ADAPTER) if candidate.has(ADAPTER) else None
        )

    @classmethod
    def open(cls, detected: DetectedFormat, companions: Companions) -> Self:
        adapter = read_adapter(detected.path)
        pairs = adapter.low_rank
        ranks = ", ".join(map(str, sorted({pair.a.shape[0] for pair in pairs.values()})))
        return cls(
            detected=detected,
            companions=companions,
            name=detected.path.resolve().name,
            settings=adapter.config,
            config=None,
            tensors=tensor_entries(_adapter_tensors(adapter)),
            files=[detected.path / ADAPTER, *adapter.files],
            facts={
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


FORMATS: tuple[type[CheckpointFormat], ...] = (  # the first that matches is the one
    NativeFormat,
    TinyLlavaFormat,
    AdapterFormat,
    LlavaFirstStageFormat,
    LlavaFormat,
    TransformersFormat,
    LlavaNextFormat,
    LlavaOnevision15Format,
    LlavaOnevisionFormat,
    Qwen2VLFormat,
    Qwen25VLFormat,
    Qwen3VLFormat,
    DualEncoderFormat,
    MultiVectorFormat,
    Idefics3Format,
    InternVLFormat,
    EmbeddingGemma2Format,
    Phi3VFormat,
    MmprojFormat,
    GGUFFormat,
)
_WRITTEN: tuple[type[CheckpointFormat], ...] = (*FORMATS, SentenceTransformersFormat)
TARGETS = {one.target: one for one in _WRITTEN if one.target}  # by names of `convert --to`


def detect(path: Path) -> DetectedFormat:
    """Return the format of a file or folder.

    Raises:
        CheckpointError: no known format; the nearest one is named.
    """
    candidate = Candidate(path)
    if not path.is_dir():
        _check_file(path)
    if (found := _first_match(candidate)) is not None:
        return found
    if candidate.has(CONFIG):
        raise _unknown(candidate)
    listed = ", ".join(sorted(child.name for child in path.iterdir())[:MAX_LISTED]) or "nothing"
    raise CheckpointError(
        f"{path} holds {listed}, but neither {NATIVE} nor {CONFIG}; expected a folder that "
        "visavis, transformers, PEFT, LLaVA or TinyLLaVA wrote, or a .gguf file. The download may "
        "not be complete."
    )


def detect_config(folder: Path) -> DetectedFormat:
    """Return the format of a folder's config.json, without looking at its other files.

    Raises:
        CheckpointError: it is damaged, or of no known format.
    """
    candidate = Candidate(folder, config_only=True)
    found = _first_match(candidate)
    if found is None:
        raise _unknown(candidate)
    return found


def _first_match(candidate: Candidate) -> DetectedFormat | None:
    return next((found for one in FORMATS if (found := one.matches(candidate))), None)


def _unknown(candidate: Candidate) -> CheckpointError:
    kind, classes = (candidate.config.get(key) for key in ("model_type", "architectures"))
    known = [kind for one in FORMATS for kind in one.model_types]
    return CheckpointError(
        f"{candidate.path / CONFIG} has model_type {kind!r} and architectures {classes!r}, "
        f"expected a kind of model that is read here: {suggest(str(kind), known)}"
    )


def _check_file(path: Path) -> None:
    """Refuse a single file that cannot be read or is a part of a folder.

    Raises:
        CheckpointError: the file cannot be read, or holds weights alone.
    """
    try:
        check_regular(path)
        with path.open("rb") as file:
            start = file.read(8)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {path}: {getattr(error, 'strerror', error)}; expected a .gguf file or a "
            "folder."
        ) from error
    if start[:4] != GGUF_MAGIC and path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        raise CheckpointError(
            f"{path} is a file of weights alone, expected the folder that holds it, with its "
            f"{CONFIG} and tokenizer: give {path.parent}."
        )
