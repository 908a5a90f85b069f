"""visavis' own folder layout: `visavis.json`, safetensors and, if self-contained, `tokenizer.json`.

    visavis.json           format, name, config, profile, processor, and maybe bundle, lora_scale
    *.safetensors          tensors by their name in `VLM.state_dict()`
    tokenizer.json         only without `bundle`
    text_tokenizer.json    of a text tower, where there is one

A matrix that is kept as integers is stored as it is computed with (`model.quantized.Groups`), in
one or more parts below one another: `<name>.0.codes`, uint8 [n, in], or [n, in / 2] where a byte
holds two codes of 4 bits, the first one low; `<name>.0.scales`, bfloat16 [n, in / group, 2]; and
maybe `<name>.low` [r, in] and `<name>.high` [out, r], whose product is added.

A folder with a `bundle` (the one for `nano`) builds on weights that `bundled.fetch` provides: its
tensors replace those of the base, and a pair `<linear>.lora_a` [r, in], `<linear>.lora_b` [out, r]
adds `lora_scale * b @ a` to `<linear>.weight`. Nothing in a folder is ever executed or unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property, partial
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Self, get_args, get_origin, get_type_hints

import torch
from safetensors.torch import save_file
from torch import Tensor

from visavis.checkpoints import bundled
from visavis.checkpoints.bert import load_bert
from visavis.checkpoints.checkpoint import (
    Checkpoint,
    Written,
    blank,
    checkpoint_fingerprint,
    whole_state,
    write_json,
    write_tensors,
    write_words,
)
from visavis.checkpoints.checkpoint_format import (
    Candidate,
    CheckpointFormat,
    Companions,
    DetectedFormat,
    tensor_entries,
)
from visavis.checkpoints.efficientnet import load_efficientnet
from visavis.checkpoints.gguf.decoder import check_types, decoder_tensors, dequantized
from visavis.checkpoints.gguf.reader import GGUFFile, open_gguf
from visavis.checkpoints.gguf.repack import pack_blocks, take_blocks
from visavis.checkpoints.low_rank import low_rank_pairs, merge
from visavis.checkpoints.quantize import LowRank, Quantizer, WeightPart
from visavis.checkpoints.tensor_files import StoredTensor, TensorFiles, read_tensors
from visavis.errors import CheckpointError
from visavis.model.config import (
    BertConfig,
    VLMConfig,
    to_dict,
    vlm_config_from_dict,
)
from visavis.model.image_tokens import tokens_per_view
from visavis.model.quantized_linear import GROUP, Groups, QuantizedLinear, groups_of, quantize
from visavis.model.vlm import VLM
from visavis.processing.config import ImageProcessorConfig
from visavis.processing.prompt_config import PromptConfig
from visavis.processing.tokenizer import (
    SpecialTokens,
    build_tokenizer,
    load_tokenizer,
    special_tokens,
)
from visavis.processing.tokenizer_check import read_tokenizer
from visavis.utils import parse_json, write_atomically

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FORMAT = "visavis/1"
CONFIG_NAME = "visavis.json"
TEXT_TOKENIZER = "text_tokenizer.json"
PACKED = re.compile(r"(decoder\..+\.weight)\.(\d+\.codes|\d+\.scales|low|high)")
MAX_NUMBER = 2**27
MAX_LAYERS = 1000


def read_config(folder: Path) -> dict[str, Any]:
    """Return `visavis.json` of a folder, checked for form but without touching weights.

    Raises:
        CheckpointError: the file is absent, not JSON, of another format or lacks a field.
    """
    path = folder / CONFIG_NAME
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
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
) -> tuple[VLMConfig, PromptConfig, ImageProcessorConfig | None]:
    """Return the configs in `visavis.json`, after checking that they describe a valid model.

    Raises:
        CheckpointError: a field is unknown, missing or of a value that no model has.
    """
    try:
        _check_numbers(data["config"])
        config = vlm_config_from_dict(data["config"])
        _check_types(config)
        blank(config, torch.float32)
        if not 0 < (share := config.decoder.rope_fraction) <= 1:
            raise ValueError(f"rope_fraction is {share}, expected above 0 and at most 1")
        if config.tower is not None and not config.tower.any_resolution:
            _check_numbers(tokens_per_view(config), "tokens per image")
        texts = {name: value for name, value in data["profile"].items() if name != "min_score"}
        if not all(isinstance(value, str) for value in texts.values()):
            raise ValueError(f"profile is {data['profile']}, expected texts")
        if not isinstance(data["profile"].get("min_score", -1.0), float | int):
            raise ValueError(f"min_score is {data['profile']['min_score']!r}, expected a number")
        profile = PromptConfig(**data["profile"])
        processor = data.get("processor")
        return config, profile, ImageProcessorConfig.from_dict(processor) if processor else None
    except Exception as error:  # whatever wrong values lead modules to
        raise CheckpointError(
            f"{folder / CONFIG_NAME} does not describe a model that this version knows "
            f"({type(error).__name__}: {error}). Upgrade visavis, or copy the folder again."
        ) from error


def _check_types(part: Any, key: str = "config") -> None:
    """Refuse a value, such as null, of another type than its field of a config has."""
    hints = get_type_hints(type(part))
    for name in (field.name for field in fields(part)):
        value, hint, where = getattr(part, name), hints[name], f"{key}.{name}"
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        if is_dataclass(value):
            _check_types(value, where)
        else:
            choices = [choice for kind in kinds for choice in get_args(kind)]  # of a Literal
            allowed = {get_origin(kind) or kind for kind in kinds}
            allowed |= ({int} if float in kinds else set()) | (
                {list} if tuple in allowed else set()
            )
            if type(value) not in allowed and value not in choices:
                raise ValueError(f"{where} is {value!r}, expected {hint}")


def _check_numbers(value: Any, key: str = "config") -> None:
    """Refuse numbers beyond those of any real model, of which building one would take forever."""
    if isinstance(value, dict | list):
        for name, below in value.items() if isinstance(value, dict) else enumerate(value):
            _check_numbers(below, f"{key}.{name}")
    elif isinstance(value, int | float):
        limit = MAX_LAYERS if key.endswith(("num_layers", "depth")) else MAX_NUMBER
        if not -limit <= value <= limit:
            raise ValueError(f"{key} is {value}, expected at most {limit}")


@dataclass(kw_only=True)
class NativeFormat(CheckpointFormat):
    """visavis' own folder.

    Attributes:
        weights: the folder's own tensors.
        profile: the chat format, and how items are embedded.
    """

    kind = "native"
    title = "visavis folder"
    target = "native"
    holds_integers = True

    weights: TensorFiles
    profile: PromptConfig

    @classmethod
    def matches(cls, candidate: Candidate) -> DetectedFormat | None:
        if not candidate.has(CONFIG_NAME):
            return None
        return cls.found(candidate, f"it has {CONFIG_NAME}", CONFIG_NAME)

    @classmethod
    def open(cls, detected: DetectedFormat, companions: Companions) -> Self:
        folder = detected.path
        data = read_config(folder)
        config, profile, processor = read_settings(folder, data)
        files = sorted(folder.glob("*.safetensors"))
        weights = read_tensors(files)
        base = bundled.files_of(str(data["bundle"])) if "bundle" in data else []
        return cls(
            detected=detected,
            companions=companions,
            name=str(data["name"]),
            settings={key: value for key, value in data.items() if key != "name"},
            config=config,
            processor=processor,
            tensors=tensor_entries(weights.entries),
            files=[folder / CONFIG_NAME, *files, *base],
            facts={key: str(value) for key, value in data["profile"].items() if value},
            lacking="" if files else f"no .safetensors file in {folder}; copy the folder again.",
            weights=weights,
            profile=profile,
        )

    @classmethod
    def read_config(cls, path: Path) -> tuple[VLMConfig, ImageProcessorConfig | None]:
        config, _, processor = read_settings(path, read_config(path))
        return config, processor

    @classmethod
    def save(
        cls, checkpoint: Checkpoint, folder: Path, *, kind: str = "", progress: bool = False
    ) -> Written:
        return write_native(checkpoint, folder, progress=progress)

    @cached_property
    def base(self) -> GGUFFile | None:
        """The language model that the folder builds on."""
        if "bundle" not in self.settings:
            return None
        if self.companions.fetch:
            bundled.fetch(self.settings["bundle"])
        return open_gguf(bundled.files_of(self.settings["bundle"])[0])

    def tokenizer(self) -> tuple[Tokenizer, SpecialTokens]:
        if self.base is None:
            return load_tokenizer(self.path)
        return build_tokenizer(self.base.metadata), special_tokens(self.base.metadata)

    def prompt_config(self, tokenizer: Tokenizer, specials: SpecialTokens) -> PromptConfig:
        return self.profile

    def text_tokenizer(self) -> Tokenizer | None:
        assert self.config is not None
        if not isinstance(self.config.text_tower, BertConfig):
            return None  # CLIP's is read by the folder's only tokenizer
        return read_tokenizer(self.path / TEXT_TOKENIZER)

    def state(self, quantizer: Quantizer) -> tuple[dict[str, Tensor], LowRank | None]:
        if self.base is None:
            return own_state(self.weights, quantizer)
        scale = float(self.settings.get("lora_scale", 1.0))
        towers = bundled.files_of(self.settings["bundle"])[1:]
        state = bundled_state(self.base, towers, quantizer, self.weights, scale, self.path)
        return state, low_rank_pairs(self.weights, scale)

    def fingerprint(self, quantizer: Quantizer) -> str:
        return checkpoint_fingerprint(self.files, {**self.settings, "name": self.name})

    def misfits(self) -> list[str]:
        if self.config is None or "bundle" in self.settings:
            return []
        expected = blank(self.config, torch.float32).state_dict()
        if self.config.decoder.tied_head:
            expected.pop("decoder.head.weight")
        whole = [match[1] if (match := PACKED.fullmatch(name)) else name for name in self.tensors]
        problems = [f"missing {name}" for name in expected if name not in whole]
        return problems + [f"unexpected {name}" for name in whole if name not in expected]


def bundled_state(
    file: GGUFFile,
    towers: Sequence[Path],
    packing: Quantizer,
    own: Mapping[str, Tensor],
    scale: float,
    folder: Path,
) -> dict[str, Tensor]:
    """Return the base's tensors with the adapter laid over them, packed where they are to be. A
    linear that a LoRA touches is in float32 only until it is merged.

    Raises:
        CheckpointError: see `merge`.
    """
    state: dict[str, Tensor] = {}
    merged: set[str] = set()
    check_types(file)
    for name, stored in decoder_tensors(file):
        linear = name.removesuffix(".weight")
        pair = {key: own[key] for key in (f"{linear}.lora_a", f"{linear}.lora_b") if key in own}
        if name in own:
            continue
        if pair:
            state[name] = torch.empty(packing.expected[name].shape, device="meta")
            if pack_blocks(packing, file, name, stored) is None or packing.keeps_dense:
                one = {name: torch.from_numpy(dequantized(file, name, stored))}
                merge(one, pair, scale, folder)
                state[name] = packing.cast(name, one[name])
            merged |= pair.keys()
        else:
            state[name] = take_blocks(packing, file, name, stored)
    if packing.config.tower is not None:
        tower, _ = load_efficientnet(towers[0])
        state.update({f"tower.{name}": tensor for name, tensor in tower.items()})
    if isinstance(packing.config.text_tower, BertConfig):
        text = load_bert(towers[1], packing.config.text_tower)
        state.update({f"text_tower.{name}": tensor for name, tensor in text.items()})
    merge(state, {name: own[name] for name in own if name not in merged}, scale, folder)
    return state


def own_state(own: TensorFiles, packing: Quantizer) -> tuple[dict[str, Tensor], LowRank]:
    """Return a whole folder's tensors, packed where they are to be, and its low-rank pairs.

    Raises:
        CheckpointError: integers and scales do not belong together.
    """
    state: dict[str, Tensor] = {}
    packed: dict[str, dict[str, StoredTensor]] = {}
    for name, stored in own.entries.items():
        if match := PACKED.fullmatch(name):
            packed.setdefault(match[1], {})[match[2]] = stored
        else:
            expected = packing.expected.get(name)
            whole = expected is not None and not expected.is_floating_point()  # lists of token ids
            state[name] = stored() if whole else packing.take(name, stored())
    pairs = {}
    for name, found in packed.items():
        state[name] = _take_packed(name, found, packing)
        if "low" in found and "high" in found:
            pairs[name.removesuffix(".weight")] = (found["low"](), found["high"]())
    return state, pairs


def _take_packed(name: str, found: dict[str, StoredTensor], packing: Quantizer) -> Tensor:
    """Return the state entry for a matrix that is stored as integers."""
    count = sum(key.endswith("codes") for key in found)
    groups = [_stored_groups(name, found, number, packing) for number in range(count)]
    shape = (sum(len(part.codes) for part in groups), groups[0].codes.shape[1])
    parts = []
    for own in groups:
        bits = packing.bits_of(name, shape, own.bits)
        if bits is None:
            break
        group = own.group if bits == own.bits else GROUP
        parts.append(WeightPart(len(own.codes), bits, group, partial(_cut, own, bits)))
    else:
        return packing.pack(name, shape[1], parts)
    values = torch.cat([part.values() for part in groups])
    if "low" in found and "high" in found:
        values += found["high"]().float() @ found["low"]().float()
    return packing.take(name, values)


def _cut(own: Groups, bits: int, start: int, end: int) -> Groups:
    rows = own.between(start, end)
    return rows if own.bits == bits else quantize(rows.values(), bits)


def _stored_groups(
    name: str, found: dict[str, StoredTensor], part: int, packing: Quantizer
) -> Groups:
    """Return one part of a matrix: 4 bits if two codes share a byte."""
    codes, scales = (found.get(f"{part}.{kind}") for kind in ("codes", "scales"))
    expected = packing.expected.get(name)
    if codes is not None and scales is not None and expected is not None:
        inside = expected.shape[-1]
        bits = {inside: 8, inside // 2: 4}.get(codes.shape[-1])
        groups = {inside // group for group in (GROUP, 2 * GROUP) if inside % group == 0}
        shaped = len(codes.shape) == 2 and scales.shape[::2] == (codes.shape[0], 2)
        types = (codes.dtype, scales.dtype) == (torch.uint8, torch.bfloat16)
        if bits and types and shaped and scales.shape[1] in groups:
            read, pairs = codes(), scales()
            whole = read if bits == 8 else torch.stack((read & 15, read >> 4), -1).flatten(1)
            if pairs.isfinite().all():
                return Groups(whole, pairs, bits)
    raise CheckpointError(
        f"{packing.where}: the integers of {name} and their scales do not belong together, "
        "expected codes and finite scales of the same rows; the file is damaged: copy it again."
    )


def write_native(
    loaded: Checkpoint,
    folder: Path,
    *,
    progress: bool = False,
    state: Mapping[str, Tensor] | None = None,
) -> Written:
    """Write a model loaded from any layout as a self-contained folder.

    Tensors keep the types that they were loaded in.

    Args:
        state: tensors to write instead of the model's own.
    """
    context_length = loaded.vlm.config.decoder.context_length
    files = write_words(folder, loaded.tokenizer, loaded.specials, context_length=context_length)
    state = stored_state(loaded.vlm) if state is None else state
    files += write_tensors(folder, state, progress=progress)
    data = _settings(loaded.name, loaded.vlm.config, loaded.profile, loaded.processor)
    if loaded.text_tokenizer is not None:
        loaded.text_tokenizer.save(str(folder / TEXT_TOKENIZER))
        files.append(folder / TEXT_TOKENIZER)
    return Written([write_json(folder / CONFIG_NAME, data), *files])


def stored_state(vlm: VLM) -> dict[str, Tensor]:
    """Return a model's tensors by the names that they are stored under, packed ones as integers."""
    state, tied = whole_state(vlm, packed=False), vlm.config.decoder.tied_head
    for name, module in vlm.named_modules():
        if not isinstance(module, QuantizedLinear):
            continue
        weight = f"{'decoder.embed' if tied and name == 'decoder.head' else name}.weight"
        state.pop(weight, None)
        for number, part in enumerate(module.parts):
            codes, scales, bits = groups_of(part, torch.arange(part.num_rows))
            even, odd = codes[:, ::2], codes[:, 1::2]
            state[f"{weight}.{number}.codes"] = even | odd << 4 if bits == 4 else codes
            state[f"{weight}.{number}.scales"] = scales.contiguous()
        if module.low is not None and module.high is not None:
            state |= {f"{weight}.low": module.low, f"{weight}.high": module.high}
    return state


def save_native(
    folder: Path,
    *,
    name: str,
    config: VLMConfig,
    tensors: dict[str, Tensor],
    profile: PromptConfig,
    processor: ImageProcessorConfig | None,
    bundle: str = "",
    lora_scale: float = 1.0,
    file_name: str = "model.safetensors",
) -> None:
    """Write a folder that `NativeFormat` reads; each file appears whole or not at all.

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
    profile: PromptConfig,
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
