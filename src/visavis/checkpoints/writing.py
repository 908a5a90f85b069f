"""What every layout that is written shares: a model's whole state, tensors in shards, tokenizer.

    model.safetensors | model-00001-of-00003.safetensors … + model.safetensors.index.json
    tokenizer.json  tokenizer_config.json  generation_config.json

Tensors are turned into bytes one by one: writing takes no more memory than the largest of them.
Knows no layout's names or settings.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from visavis.checkpoints.weight_files import DTYPES, INDEX
from visavis.model.quantized import PackedLinear
from visavis.model.vlm import VLM
from visavis.progress import track

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from visavis.processing.tokenizer import SpecialTokens

MAX_SHARD_BYTES = 5 * 10**9
NAMES = {dtype: name for name, dtype in DTYPES.items()}  # of types, in safetensors


@dataclass(frozen=True)
class Written:
    """What a writer made: its files, and what the layout has no words for and lost."""

    files: list[Path]
    lost: list[str] = field(default_factory=list)


def whole_state(vlm: VLM, *, packed: bool = True) -> dict[str, Tensor]:
    """Return every tensor of a model by its name in `VLM.state_dict()`, without a tied head.

    Args:
        packed: those that are kept packed too, as what they compute.
    """
    state = dict(vlm.state_dict())
    for name, module in vlm.named_modules():
        if isinstance(module, PackedLinear) and packed:
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
) -> list[Path]:
    """Write the tokenizer's files, as transformers and `load_tokenizer` read them."""

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
    visuals = {"image_token": image_token, "video_token": video_token}
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
