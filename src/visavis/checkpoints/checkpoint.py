"""The loaded checkpoint that every layout returns, built from tensors by our names."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from visavis.checkpoints.tensor_files import DTYPES, INDEX
from visavis.errors import CheckpointError
from visavis.model.config import EfficientNetConfig, VLMConfig
from visavis.model.embedder_config import ClipTextConfig, GemmaEncoderConfig
from visavis.model.quantized_linear import QuantizedLinear
from visavis.model.vlm import VLM
from visavis.processing.prompt_encoder import PromptEncoder
from visavis.utils import lookup, track

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from visavis.processing.config import ImageProcessorConfig
    from visavis.processing.prompt_config import PromptConfig
    from visavis.processing.tokenizer import SpecialTokens


INTEGERS = {"int8": 8, "int4": 4}  # precisions that keep weights in so many bits at most


@dataclass
class Checkpoint:
    """A model with what its prompts and images need."""

    name: str
    vlm: VLM
    tokenizer: Tokenizer
    specials: SpecialTokens
    profile: PromptConfig
    processor: ImageProcessorConfig | None
    fingerprint: str  # changes when vectors would: hash of weights, config and profile
    files: list[Path] = field(default_factory=list)
    text_tokenizer: Tokenizer | None = None  # of the text tower

    @property
    def encoder(self) -> PromptEncoder:
        """The way from prompts to ids."""
        return PromptEncoder(
            self.name,
            self.vlm.config,
            self.tokenizer,
            self.specials,
            self.profile,
            self.processor,
            self.text_tokenizer,
        )


def auto_dtype(precision: str, device: str) -> torch.dtype:
    """Return the dtype of matrix products for a `precision` name.

    `auto` is bfloat16 on CUDA and on processors with bf16 instructions, else float32. `int8` and
    `int4` only set how weights are stored; their products use the same dtype as `auto`.
    """
    best = torch.bfloat16 if device != "cpu" or has_bf16_instructions() else torch.float32
    dtypes = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
    return lookup("precision", precision, dict.fromkeys(("auto", *INTEGERS), best) | dtypes)


def has_bf16_instructions() -> bool:
    """Return whether this processor multiplies bfloat16 natively."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def blank(config: VLMConfig, dtype: torch.dtype) -> VLM:
    """Return a model without numbers, each tensor of the type that it will run in."""
    with torch.device("meta"):
        vlm = VLM(config).cast(dtype)
    if vlm.tower is not None and not isinstance(config.tower, EfficientNetConfig):
        vlm.tower.to(dtype)  # EfficientNet's convolutions lose too much in half precision
    if isinstance(config.text_tower, ClipTextConfig | GemmaEncoderConfig):
        assert vlm.text_tower is not None
        vlm.text_tower.to(dtype)
    return vlm


def build(
    config: VLMConfig, state: dict[str, Tensor], dtype: torch.dtype, device: str, *, where: str
) -> VLM:
    """Return a model that owns the given tensors; no random initialisation, no second copy.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape.
    """
    vlm = blank(config, dtype)
    if config.decoder.tied_head:
        state["decoder.head.weight"] = state.get("decoder.embed.weight", torch.empty(0))
    expected = vlm.state_dict()
    problems = [f"missing {name}" for name in sorted(expected.keys() - state.keys())]
    problems += [f"unexpected {name}" for name in sorted(state.keys() - expected.keys())]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & state.keys())
        if state[name].shape != expected[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"the tensors of {where} do not fit its config: {'; '.join(problems[:5])}{more}. "
            "The config belongs to other weights, or a file is missing."
        )
    for name, tensor in state.items():
        if not tensor.is_meta:  # packed, see packing.py
            state[name] = tensor.to(device, expected[name].dtype)
    vlm.load_state_dict(state, assign=True)
    if config.decoder.tied_head:
        vlm.decoder.head.weight = vlm.decoder.embed.weight
    if vlm.tower is not None:
        vlm.tower = vlm.tower.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return vlm.requires_grad_(False).eval()


def checkpoint_fingerprint(files: list[Path], data: dict[str, Any]) -> str:
    """Return 16 hex digits that change when the weights' files or the settings do.

    Small files are hashed whole; of large ones the size and both ends are, which costs nothing and
    still tells two checkpoints apart.
    """
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read(1 << 20))
    return digest.hexdigest()[:16]


MAX_SHARD_BYTES = 5 * 10**9
NAMES = {dtype: name for name, dtype in DTYPES.items()}  # of types, in safetensors


@dataclass(frozen=True)
class Written:
    """The result of a writer: its files, and the settings that the layout cannot represent."""

    files: list[Path]
    lost: list[str] = field(default_factory=list)


def whole_state(vlm: VLM, *, packed: bool = True) -> dict[str, Tensor]:
    """Return every tensor of a model by its name in `VLM.state_dict()`, without a tied head.

    Args:
        packed: those that are kept packed too, as what they compute.
    """
    state = dict(vlm.state_dict())
    for name, module in vlm.named_modules():
        if isinstance(module, QuantizedLinear) and packed:
            state[f"{name}.weight"] = module.weight
    if vlm.config.decoder.tied_head:
        state.pop("decoder.head.weight", None)
    return state


def write_tensors(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Write tensors as safetensors, in several files with an index if they are large.

    Args:
        dtype: what all of them are stored in; None: each in its own.
    """
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, tensor in tensors.items():
        room -= _num_bytes(tensor, dtype)
        if room < 0 and shards[-1]:
            shards.append([])
            room = max_shard_bytes - _num_bytes(tensor, dtype)
        shards[-1].append(name)
    paths = [folder / "model.safetensors"]
    if len(shards) > 1:
        of = len(shards)
        paths = [folder / f"model-{i + 1:05}-of-{of:05}.safetensors" for i in range(of)]
        where = {name: p.name for p, names in zip(paths, shards, strict=True) for name in names}
        total = sum(_num_bytes(tensor, dtype) for tensor in tensors.values())
        write_json(
            folder / f"model.safetensors{INDEX}",
            {"metadata": {"total_size": total}, "weight_map": where},
        )
    pairs = list(zip(paths, shards, strict=True))
    weights = [1 + sum(_num_bytes(tensors[n], dtype) for n in names) // 10**6 for names in shards]
    for path, names in track(pairs, "writing, MB", weights=weights, show=progress):
        _write_shard(path, {name: tensors[name] for name in names}, dtype)
    return paths


def write_words(
    folder: Path,
    tokenizer: Tokenizer,
    specials: SpecialTokens,
    *,
    context_length: int,
    image_token: str = "",
    video_token: str = "",
    tokens: Mapping[str, str] = MappingProxyType({}),
    chats: bool = True,
) -> list[Path]:
    """Write the tokenizer's files, as transformers and `load_tokenizer` read them.

    Args:
        tokens: further tokens by the names that a processor of the library has for them.
        chats: write generation_config.json, which says what ends an answer.
    """

    def text(number: int | None) -> str | None:
        return None if number is None else tokenizer.id_to_token(number)

    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": text(specials.bos_id),
        "eos_token": text(specials.eos_id),
        "pad_token": text(specials.pad_id),
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    visuals = {"image_token": image_token, "video_token": video_token, **tokens}
    if any(visuals.values()):
        settings["extra_special_tokens"] = {name: token for name, token in visuals.items() if token}
    generation: dict[str, Any] = {
        "bos_token_id": specials.bos_id,
        "eos_token_id": list(specials.eot_ids),
        "pad_token_id": specials.pad_id,
        "do_sample": False,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    paths = [folder / f"{name}.json" for name in ("tokenizer_config", "generation_config")]
    write_json(paths[0], {key: value for key, value in settings.items() if value is not None})
    if not chats:
        return [folder / "tokenizer.json", paths[0]]
    write_json(paths[1], {key: value for key, value in generation.items() if value is not None})
    return [folder / "tokenizer.json", *paths]


def write_json(path: Path, value: Any) -> Path:
    """Write one JSON document, as people read it."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _num_bytes(tensor: Tensor, dtype: torch.dtype | None) -> int:
    return tensor.numel() * (dtype or tensor.dtype).itemsize


def _write_shard(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Write one safetensors file: length of the header, header, bytes of each tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + _num_bytes(tensor, dtype)
        kind = NAMES[dtype or tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            flat = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
