"""LoRA adapters in PEFT's layout, merged into the tensors of their base while these are read.

    adapter_config.json   r, alpha, rank-stabilised or not, DoRA or not
    adapter_model.safetensors | .bin      <module>.lora_A.weight [r, in], .lora_B.weight [out, r]
    non_lora_trainables.bin               LLaVA's: whole tensors that were trained beside

An adapter may stand on another adapter. Works on names of the base's own layout, so every layout
that is read by name can be a base; knows none of them.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visavis.checkpoints import hub
from visavis.checkpoints.tensor_files import (
    FLOATS,
    StoredTensor,
    TensorFiles,
    read_headers,
    read_json,
)
from visavis.checkpoints.transformers.config_reader import number, require, section, without_nulls
from visavis.errors import CheckpointError, FetchError
from visavis.processing.patterns import first_matches

CONFIG_NAME = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # the first that is there is read
TRAINED_BESIDE = "non_lora_trainables.bin"
LORA = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)(?:\.weight)?")
MAX_CHAIN = 8
MAX_LISTED = 4
# Settings that change what is merged, and the value at which they do not.
PLAIN: dict[str, Any] = {
    "fan_in_fan_out": False,
    "layer_replication": None,
    "lora_bias": False,
    "use_qalora": False,
    "use_bdlora": None,
    "alora_invocation_tokens": None,
}
TOKENS = "trainable_token_indices"


@dataclass(frozen=True)
class LowRank:
    """A low-rank update of one matrix [out, in]: `scale * b @ a` is added to it.

    With DoRA the rows of the sum are then rescaled to the lengths in `magnitude`.
    """

    a: StoredTensor  # [r, in]
    b: StoredTensor  # [out, r]
    scale: float
    magnitude: StoredTensor | None = None  # [out]

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    def merge(self, weight: StoredTensor) -> Tensor:
        """Return the matrix with the adapter in it, float32."""
        whole = weight().float() + self.scale * (self.b().float() @ self.a().float())
        if self.magnitude is None:
            return whole
        lengths = whole.norm(dim=1)
        scaled: Tensor = whole * (self.magnitude().float().flatten() / lengths)[:, None]
        return scaled


@dataclass(frozen=True)
class Adapter:
    """One adapter folder, read.

    Attributes:
        low_rank: by the name of the matrix, as the base's layout may spell it.
        replaced: tensors that are replaced or added whole.
    """

    folder: Path
    config: dict[str, Any]
    low_rank: dict[str, LowRank]
    replaced: dict[str, StoredTensor]
    files: list[Path]


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG_NAME).is_file()


def adapter_chain(folder: Path, base: Path | None) -> tuple[list[Adapter], Path]:
    """Return an adapter with those it stands on, the innermost first, and the model below.

    Args:
        base: the model or adapter below; None: the folder that adapter_config.json names.

    Raises:
        CheckpointError: a file is absent or damaged, or the base is not on this machine.
    """
    chain: list[Adapter] = []
    while is_adapter(folder):
        if len(chain) == MAX_CHAIN:
            raise CheckpointError(
                f"more than {MAX_CHAIN} adapters stand on one another, the last of them {folder}; "
                "expected a model below: its base may name itself, give it with base='…'."
            )
        chain.append(read_adapter(folder))
        folder, base = base or _named_base(folder), None
    return chain[::-1], folder


def read_adapter(folder: Path) -> Adapter:
    """Read one adapter folder.

    Raises:
        CheckpointError: a file is absent or damaged, or a kind of adapter that is not read here.
    """
    config = {**PLAIN, **without_nulls(read_json(folder / CONFIG_NAME))}
    kind = config.get("peft_type")
    require("peft_type", kind, kind == "LORA", "'LORA'")
    for name, plain in PLAIN.items():
        require(name, config[name], config[name] == plain, f"{plain!r}")
    if config.get(TOKENS):
        raise CheckpointError(
            f"{folder / CONFIG_NAME} sets {TOKENS} to {str(config[TOKENS])[:60]}: PEFT trained "
            "single rows of the token embedding, which are not read here. Merge the adapter with "
            "PEFT (merge_and_unload, then save_pretrained) and load the result."
        )
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(
            f"{folder} has {CONFIG_NAME} but no weights; expected {' or '.join(WEIGHTS)}, fetch "
            "the folder again."
        )
    parts: dict[str, dict[str, StoredTensor]] = {}
    replaced: dict[str, StoredTensor] = {}
    files = [path]
    for name, stored in read_headers([path]).items():
        name = name.removeprefix("base_model.model.")
        if found := LORA.fullmatch(name):
            parts.setdefault(found[1], {})[found[2]] = stored
        else:
            replaced[name.replace(".base_layer.", ".")] = stored
    if (folder / TRAINED_BESIDE).is_file():
        files.append(folder / TRAINED_BESIDE)
        replaced |= _trained_beside(folder / TRAINED_BESIDE)
    strange = [name for name in replaced if ".lora_" in name or ".modules_to_save." in name]
    if strange:
        raise CheckpointError(
            f"{path} holds {', '.join(strange[:MAX_LISTED])}, expected pairs of lora_A and lora_B "
            "of linear layers; adapters of embeddings and convolutions are not read here."
        )
    settings = _settings(config, list(parts))
    low_rank = {
        f"{module}.weight": _low_rank(module, found, settings[module], path)
        for module, found in parts.items()
    }
    return Adapter(folder, config, low_rank, replaced, files)


def merged(
    tensors: TensorFiles, adapters: Sequence[Adapter], canonical: Callable[[str], str]
) -> TensorFiles:
    """Return the base's tensors with adapters merged, each when it is read.

    Args:
        canonical: a name of the base's layout in one of its spellings.

    Raises:
        CheckpointError: an adapter changes what the base does not have, or of another shape.
    """
    entries = dict(tensors.entries)
    for adapter in adapters:
        names = {canonical(name): name for name in entries}
        for name, entry in adapter.replaced.items():
            entries[names.get(canonical(name), name)] = entry
        names = {canonical(name): name for name in entries}
        absent = [name for name in adapter.low_rank if canonical(name) not in names]
        if absent:
            raise CheckpointError(
                f"{adapter.folder} changes {', '.join(absent[:MAX_LISTED])}, which its base has "
                "not; it was trained on another model, give that one with base='…'."
            )
        for name, pair in adapter.low_rank.items():
            there = names[canonical(name)]
            stored = entries[there]
            if stored.shape != pair.shape:
                raise CheckpointError(
                    f"{adapter.folder} changes {there} of shape {pair.shape}, but its base has "
                    f"{stored.shape}; it was trained on another model, give that one with base='…'."
                )
            if stored.dtype not in FLOATS:
                raise CheckpointError(
                    f"{there}, which {adapter.folder} changes, is {stored.dtype} in its base, "
                    "expected floating-point weights; use the unquantised base."
                )
            read = partial(pair.merge, stored)
            entries[there] = StoredTensor(torch.float32, stored.shape, read)
    return TensorFiles(entries)


def _named_base(folder: Path) -> Path:
    """Return the base that an adapter names: a folder of this machine, or from the hub."""
    named = read_json(folder / CONFIG_NAME).get("base_model_name_or_path")
    places = [folder / str(named), Path(str(named))] if named else []
    found = next((place for place in places if os.path.isdir(place)), None)
    if found is not None:
        return found
    try:
        wanted = hub.parse(str(named))
        if wanted is not None:
            return hub.fetch(wanted)
        reason = "it is no name on the hub either"
    except FetchError as error:
        reason = str(error)
    raise CheckpointError(
        f"{folder} is an adapter of {named!r}, which is no folder here; fetch that model and give "
        f"its folder: visavis.load(…, base='…'). ({reason})"
    )


def _low_rank(
    module: str, found: Mapping[str, StoredTensor], config: Mapping[str, Any], path: Path
) -> LowRank:
    """Return the low-rank update of one matrix, with the scale from the config."""
    a, b = found.get("lora_A.weight"), found.get("lora_B.weight")
    magnitude = found.get("lora_magnitude_vector")
    fit = a is not None and b is not None and len(a.shape) == len(b.shape) == 2
    if a is None or b is None or not fit or not 0 < a.shape[0] == b.shape[1]:
        shapes = ", ".join(f"{part} {stored.shape}" for part, stored in found.items())
        raise CheckpointError(
            f"{path}: {module} has {shapes}, expected lora_A [r, in] and lora_B [out, r]; the "
            "file is damaged, or the layer is not a linear one."
        )
    lengths = 0 if magnitude is None else math.prod(magnitude.shape)
    if lengths != (b.shape[0] if config.get("use_dora") else 0):
        raise CheckpointError(
            f"{path}: {module} has {lengths or 'no'} row lengths (lora_magnitude_vector) for "
            f"{b.shape[0]} rows, but {CONFIG_NAME} sets use_dora to "
            f"{config.get('use_dora', False)}; the two belong to different adapters, fetch them "
            "again."
        )
    rank = a.shape[0]
    alpha = number(config, "lora_alpha")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    require("r", config["r"], config["r"] == rank, f"{rank}, the rank of {module}")
    return LowRank(a, b, scale, magnitude)


def _settings(config: Mapping[str, Any], modules: list[str]) -> dict[str, dict[str, Any]]:
    """Return the settings of each module, with its own rank and alpha where a pattern names it."""
    found: dict[str, dict[str, Any]] = {}
    keys = (("r", "rank_pattern", 8), ("lora_alpha", "alpha_pattern", 8))
    for key, pattern, default in keys:
        special = section(config, pattern)
        named = first_matches(list(special), modules) if special else [None] * len(modules)
        for module, one in zip(modules, named, strict=True):
            value = config.get(key, default) if one is None else special[one]
            found.setdefault(module, dict(config))[key] = value
    return found


def _trained_beside(path: Path) -> dict[str, StoredTensor]:
    """Return LLaVA's tensors that were trained whole, by the names of its layout."""
    found = read_headers([path])
    names = {name: name.removeprefix("base_model.") for name in found}
    if any(name.startswith("model.model.") for name in names.values()):
        names = {name: short.removeprefix("model.") for name, short in names.items()}
    return {names[name]: entry for name, entry in found.items()}
