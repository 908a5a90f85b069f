"""visavis' own folder layout: `visavis.json`, safetensors and, if self-contained, `tokenizer.json`.

    visavis.json           format, name, config, profile, processor, and maybe bundle, lora_scale
    *.safetensors          tensors by their name in `VLM.state_dict()`
    tokenizer.json         only without `bundle`

A folder with a `bundle` (the one for `nano`) builds on weights that `bundled.fetch` provides: its
tensors replace those of the base, and a pair `<linear>.lora_a` [r, in], `<linear>.lora_b` [out, r]
adds `lora_scale * b @ a` to `<linear>.weight`. Nothing in a folder is ever executed or unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from visavis.checkpoints import bundled
from visavis.checkpoints.efficientnet import load_efficientnet
from visavis.checkpoints.gguf import decoder as gguf_decoder
from visavis.checkpoints.gguf.reader import GGUFFile, open_gguf
from visavis.checkpoints.loaded import Loaded, auto_dtype, blank, build, fingerprint
from visavis.checkpoints.packing import pack_linears
from visavis.checkpoints.writing import (
    Written,
    whole_state,
    write_json,
    write_tensors,
    write_words,
)
from visavis.errors import CheckpointError
from visavis.files import write_atomically
from visavis.model.config import Qwen2VLTowerConfig, VLMConfig, to_dict, vlm_config_from_dict
from visavis.processing.images import ImageProcessorConfig
from visavis.processing.profile import PromptProfile
from visavis.processing.tokenizer import build_tokenizer, load_tokenizer, special_tokens

FORMAT = "visavis/1"
CONFIG_NAME = "visavis.json"
MAX_NUMBER = 2**27
MAX_LAYERS = 1000


def read_config(folder: Path) -> dict[str, Any]:
    """Return `visavis.json` of a folder, checked for form but without touching weights.

    Raises:
        CheckpointError: the file is absent, not JSON, of another format or lacks a field.
    """
    path = folder / CONFIG_NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"cannot read {path}: {error}. Expected the JSON that visavis writes beside its "
            "weights; the folder is incomplete or damaged, copy it again."
        ) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise CheckpointError(
            f"{path} has format {found!r}, expected {FORMAT!r}; it may come from a newer "
            "visavis: upgrade with `pip install -U visavis`."
        )
    missing = sorted({"name", "config", "profile"} - data.keys())
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}; copy the folder again.")
    return data


def read_settings(
    folder: Path, data: dict[str, Any]
) -> tuple[VLMConfig, PromptProfile, ImageProcessorConfig | None]:
    """Return what `visavis.json` describes, checked to make a model.

    Raises:
        CheckpointError: a field is unknown, missing or of a value that no model has.
    """
    try:
        _check_numbers(data["config"])
        config = vlm_config_from_dict(data["config"])
        blank(config, torch.float32)
        if config.tower is not None and not isinstance(config.tower, Qwen2VLTowerConfig):
            _check_numbers(config.tokens_per_image, "tokens per image")
        if not all(isinstance(value, str) for value in data["profile"].values()):
            raise ValueError(f"profile is {data['profile']}, expected texts")
        profile = PromptProfile(**data["profile"])
        processor = data.get("processor")
        return config, profile, ImageProcessorConfig.from_dict(processor) if processor else None
    except Exception as error:  # whatever wrong values lead modules to
        raise CheckpointError(
            f"{folder / CONFIG_NAME} does not describe a model that this version knows "
            f"({type(error).__name__}: {error}). Upgrade visavis, or copy the folder again."
        ) from error


def _check_numbers(value: Any, key: str = "config") -> None:
    """Refuse numbers beyond those of any real model, of which building one would take forever."""
    if isinstance(value, dict | list):
        for name, below in value.items() if isinstance(value, dict) else enumerate(value):
            _check_numbers(below, f"{key}.{name}")
    elif isinstance(value, int | float):
        limit = MAX_LAYERS if key.endswith(("num_layers", "depth")) else MAX_NUMBER
        if not -limit <= value <= limit:
            raise ValueError(f"{key} is {value}, expected at most {limit}")


def load_native(folder: Path, *, precision: str = "auto", device: str = "cpu") -> Loaded:
    """Load a folder in visavis' own layout.

    Raises:
        CheckpointError: config and tensors disagree, or a file is damaged.
        FetchError: the base weights of a bundle cannot be had.
    """
    data = read_config(folder)
    config, profile, processor = read_settings(folder, data)
    dtype = auto_dtype(precision, device)
    gguf = None
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise CheckpointError(f"no .safetensors file in {folder}; copy the folder again.")
    own = dict(_tensors(weights))
    files = [folder / CONFIG_NAME, *weights]
    if "bundle" in data:
        base = bundled.fetch(data["bundle"])
        gguf = open_gguf(base["language_model"])
        state = base_state(gguf, base["vision_tower"], config, dtype, own)
        merge(state, own, float(data.get("lora_scale", 1.0)), folder)
        tokenizer, specials = build_tokenizer(gguf.metadata), special_tokens(gguf.metadata)
        files += base.values()
    else:
        state = own
        tokenizer, specials = load_tokenizer(folder)
    vlm = build(config, state, dtype, device, where=str(folder))
    if gguf is not None and device == "cpu" and dtype == torch.bfloat16:
        scale = float(data.get("lora_scale", 1.0))
        pack_linears(vlm.decoder, gguf, low_rank_pairs(own, scale))
    return Loaded(
        name=data["name"],
        vlm=vlm,
        tokenizer=tokenizer,
        specials=specials,
        profile=profile,
        processor=processor,
        fingerprint=fingerprint(files, data),
        files=files,
    )


def base_state(
    file: GGUFFile,
    tower_path: Path,
    config: VLMConfig,
    dtype: torch.dtype,
    own: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Return the base's tensors; decoder linears that no LoRA touches come in `dtype` at once."""
    state = {}
    for name, array in gguf_decoder.decoder_state(file):
        tensor = torch.from_numpy(array)
        adapted = name.removesuffix(".weight") + ".lora_a" in own
        is_norm = tensor.dim() == 1
        state[name] = tensor if adapted or is_norm else tensor.to(dtype)
        file.release()
    if config.tower is not None:
        tower, _ = load_efficientnet(tower_path)
        state.update({f"tower.{name}": tensor for name, tensor in tower.items()})
    return state


def merge(
    state: dict[str, Tensor], own: dict[str, Tensor], lora_scale: float, folder: Path
) -> None:
    """Lay an adapter's tensors over a base, in place: replacements, then LoRA deltas.

    Raises:
        CheckpointError: half of a LoRA pair is missing, or it fits no linear of the base.
    """
    for name, tensor in own.items():
        if name.endswith(".lora_b"):
            continue
        if not name.endswith(".lora_a"):
            state[name] = tensor
            continue
        target, other = name.removesuffix(".lora_a"), name[:-1] + "b"
        weight = state.get(f"{target}.weight")
        if weight is None or other not in own or own[other].shape[0] != weight.shape[0]:
            raise CheckpointError(
                f"{folder}: {name} needs {other} and a base tensor {target}.weight with as many "
                "rows; the adapter belongs to another base model."
            )
        state[f"{target}.weight"] = weight.float().addmm(
            own[other].float(), tensor.float(), alpha=lora_scale
        )


def low_rank_pairs(own: dict[str, Tensor], scale: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Return an adapter's pairs in bfloat16 by their linear's name, the scale in the second."""
    names = [name.removesuffix(".lora_a") for name in own if name.endswith(".lora_a")]
    return {
        name: (own[f"{name}.lora_a"].bfloat16(), (scale * own[f"{name}.lora_b"].float()).bfloat16())
        for name in names
    }


def write_native(
    loaded: Loaded,
    folder: Path,
    *,
    progress: bool = False,
    state: Mapping[str, Tensor] | None = None,
) -> Written:
    """Write a loaded model whole, in the types that it was loaded in, whatever it came from: a
    folder that needs nothing beside it.

    Args:
        state: tensors to write instead of the model's own.
    """
    context_length = loaded.vlm.config.decoder.context_length
    files = write_words(folder, loaded.tokenizer, loaded.specials, context_length=context_length)
    state = whole_state(loaded.vlm) if state is None else state
    files += write_tensors(folder, state, progress=progress)
    data = _settings(loaded.name, loaded.vlm.config, loaded.profile, loaded.processor)
    return Written([write_json(folder / CONFIG_NAME, data), *files])


def save_native(
    folder: Path,
    *,
    name: str,
    config: VLMConfig,
    tensors: dict[str, Tensor],
    profile: PromptProfile,
    processor: ImageProcessorConfig | None,
    bundle: str = "",
    lora_scale: float = 1.0,
    file_name: str = "model.safetensors",
) -> None:
    """Write a folder that `load_native` reads; each file appears whole or not at all.

    Without `bundle` the caller writes `tokenizer.json` beside it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = _settings(name, config, profile, processor)
    if bundle:
        data |= {"bundle": bundle, "lora_scale": lora_scale}
    kept = {key: value.contiguous() for key, value in tensors.items()}
    if config.decoder.tied_head:
        kept.pop("decoder.head.weight", None)
    with write_atomically(folder / file_name) as temporary:
        save_file(kept, temporary)
    with write_atomically(folder / CONFIG_NAME) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _settings(
    name: str,
    config: VLMConfig,
    profile: PromptProfile,
    processor: ImageProcessorConfig | None,
) -> dict[str, Any]:
    """Return `visavis.json` of a folder that stands alone."""
    return {
        "format": FORMAT,
        "name": name,
        "config": to_dict(config),
        "profile": profile.to_dict(),
        "processor": processor.to_dict() if processor else None,
    }


def _tensors(paths: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"cannot read {path}: {error}. The file is damaged or incomplete; copy it again."
            ) from error
