"""Which layout a file or folder is in, and why: decided by what the files hold, never by names.

Every layout has one word here (`KINDS`); `load.py` has one row for each that loads. Reads
config.json and the headers of GGUF files, no weights; loads nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visavis.checkpoints.gguf.reader import MAGIC as GGUF_MAGIC
from visavis.checkpoints.gguf.reader import open_gguf
from visavis.checkpoints.tensor_files import read_json
from visavis.checkpoints.transformers.language_models import KINDS as LANGUAGE_MODELS
from visavis.errors import CheckpointError
from visavis.utils import suggest

KINDS = {  # one word per layout -> what people call it
    "native": "visavis folder",
    "adapter": "LoRA adapter",
    "gguf": "GGUF",
    "mmproj": "GGUF vision projector",
    "transformers": "transformers",
    "llava_next": "LLaVA-NeXT, transformers",
    "llava_onevision": "LLaVA-OneVision, transformers",
    "qwen2_vl": "Qwen2-VL, transformers",
    "phi3_v": "Phi-3.5-vision",
    "llava_original": "LLaVA, original",
    "llava_first_stage": "LLaVA, first stage",
    "tinyllava": "TinyLLaVA",
}
MODEL_TYPES = {  # model_type of config.json, where it alone decides
    **dict.fromkeys((*LANGUAGE_MODELS, "llava"), "transformers"),
    "llava_next": "llava_next",
    "llava_onevision": "llava_onevision",
    "qwen2_vl": "qwen2_vl",
    "phi3_v": "phi3_v",
    "tinyllava": "tinyllava",
}
# TinyLLaVA's older repositories: LLaVA's settings, classes and tensor names of their own.
TINYLLAVA_CLASSES = (
    "TinyLlavaLlamaForCausalLM",
    "TinyLlavaStablelmForCausalLM",
    "TinyLlavaPhiForCausalLM",
)
NATIVE, CONFIG, ADAPTER = "visavis.json", "config.json", "adapter_config.json"
PROJECTOR = "mm_projector.bin"  # what LLaVA's first stage trains
MAX_LISTED = 8


@dataclass(frozen=True)
class DetectedFormat:
    """What a path holds.

    Attributes:
        kind: one of `KINDS`.
        why: the file and the key that decided, for people.
        files: the files that were looked at.
    """

    kind: str
    path: Path
    why: str
    files: tuple[Path, ...]

    @property
    def title(self) -> str:
        return KINDS[self.kind]


def detect(path: Path) -> DetectedFormat:
    """Return the layout of a file or folder.

    Raises:
        CheckpointError: none that is known; the nearest one is named.
    """
    if not path.is_dir():
        return _detect_file(path)
    if (path / NATIVE).is_file():
        return DetectedFormat("native", path, f"it has {NATIVE}", (path / NATIVE,))
    config, adapter = path / CONFIG, path / ADAPTER
    if adapter.is_file():
        if config.is_file() and read_json(config).get("model_type") == "tinyllava":
            why = f"{CONFIG} has model_type 'tinyllava', beside {ADAPTER}"
            return DetectedFormat("tinyllava", path, why, (config, adapter))
        return DetectedFormat("adapter", path, f"it has {ADAPTER}", (adapter,))
    if config.is_file():
        return detect_config(path)
    if files := tuple(sorted(path.glob("*.gguf"))):
        return DetectedFormat("gguf", path, f"it has {files[0].name} and no {CONFIG}", files)
    found = ", ".join(sorted(child.name for child in path.iterdir())[:MAX_LISTED]) or "nothing"
    raise CheckpointError(
        f"{path} holds {found}, but neither {NATIVE} nor {CONFIG}; expected a folder that visavis, "
        "transformers, PEFT, LLaVA or TinyLLaVA wrote, or a .gguf file. The download may not be "
        "complete."
    )


def detect_config(folder: Path) -> DetectedFormat:
    """Return the layout that a folder's config.json is of, whatever lies beside it.

    Raises:
        CheckpointError: it is absent or damaged, or of no layout that is known.
    """
    path = folder / CONFIG
    config = read_json(path)
    classes = config.get("architectures")
    named = classes[0] if isinstance(classes, list) and classes else None
    kind = config.get("model_type")
    if named in TINYLLAVA_CLASSES:
        return DetectedFormat(
            "tinyllava", folder, f"{CONFIG} has architectures [{named!r}]", (path,)
        )
    if "mm_vision_tower" in config:
        if is_first_stage(folder):
            why = f"{CONFIG} has mm_vision_tower, and {PROJECTOR} stands without a model"
            return DetectedFormat("llava_first_stage", folder, why, (path, folder / PROJECTOR))
        return DetectedFormat("llava_original", folder, f"{CONFIG} has mm_vision_tower", (path,))
    if isinstance(kind, str) and kind in MODEL_TYPES:
        return DetectedFormat(
            MODEL_TYPES[kind], folder, f"{CONFIG} has model_type {kind!r}", (path,)
        )
    raise CheckpointError(
        f"{path} has model_type {kind!r} and architectures {classes!r}, expected a kind of model "
        f"that is read here: {suggest(str(kind), MODEL_TYPES)}"
    )


def is_first_stage(folder: Path) -> bool:
    """Return whether a folder holds LLaVA's projector and no model."""
    whole = any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*"))
    return (folder / PROJECTOR).is_file() and not whole


def _detect_file(path: Path) -> DetectedFormat:
    """Return what a single file is, by its first bytes."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}; expected a .gguf file or a folder."
        ) from error
    if start[:4] != GGUF_MAGIC and path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        raise CheckpointError(
            f"{path} is a file of weights alone, expected the folder that holds it, with its "
            f"{CONFIG} and tokenizer: give {path.parent}."
        )
    metadata: dict[str, Any] = open_gguf(path).metadata  # says what is wrong with any other file
    architecture = str(metadata.get("general.architecture"))
    why = f"a GGUF file with general.architecture {architecture!r}"
    if "split.count" in metadata:
        why += f", one of {metadata['split.count']} parts"
    return DetectedFormat("mmproj" if architecture == "clip" else "gguf", path, why, (path,))
