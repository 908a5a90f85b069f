"""A model as GGUF, for llama.cpp and all that is built on it: `model.gguf`, and `mmproj.gguf` of
its vision half.

    Loaded ── decoder, tokenizer, chat format ──► model.gguf     any type of `quantize.FILE_TYPES`
           └─ tower, connector, image processor ► mmproj.gguf    see mmproj.py

The architecture of llama.cpp follows from the decoder's config. A setting that GGUF cannot
represent is an error and is never left out. The container is written by `writer.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from visavis.checkpoints.checkpoint import Checkpoint
from visavis.checkpoints.gguf.architectures import (
    ARCHITECTURES,
    POOLING,
    PROFILE,
    Architecture,
    TensorLayout,
    shape_of,
)
from visavis.checkpoints.gguf.decoder import (
    LONG_FACTORS,
    ROPE_FACTORS,
    SHORT_FACTORS,
    side_by_side,
    split_rows,
)
from visavis.checkpoints.gguf.mmproj_export import check_exportable, write_mmproj
from visavis.checkpoints.gguf.quantize import FILE_TYPES, quantize, tensor_type
from visavis.checkpoints.gguf.writer import NewTensor, as_numpy, quantized, weight, write_file
from visavis.errors import CheckpointError
from visavis.model.config import DecoderConfig, PerLayer, RopeScaling
from visavis.model.decoder import Decoder
from visavis.model.rope import scaled
from visavis.processing.chat_formats import CHAT_FORMATS, ChatFormat, Turn
from visavis.processing.prompt_config import PromptConfig
from visavis.processing.tokenizer import SpecialTokens, build_tokenizer
from visavis.processing.tokenizer_conversion import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from visavis.utils import lookup

MODEL, MMPROJ = "model.gguf", "mmproj.gguf"
MARK_START, MARK_END = "<__media", "__>"  # what llama.cpp's marks begin and end with


def write_gguf(loaded: Checkpoint, path: str | Path, *, kind: str = "F16") -> list[Path]:
    """Write a model's language half, and its vision half if it has one; return the files.

    Args:
        path: a folder, which gets `model.gguf` and `mmproj.gguf`, or the .gguf file of the
            language half, beside which `mmproj-<its name>` goes.
        kind: a name of `quantize.FILE_TYPES`. The vision half becomes F32 with F32, Q8_0 with
            Q8_0, else F16, as llama.cpp's own tools do.

    Raises:
        UnknownNameError: no such type.
        CheckpointError: a part that llama.cpp cannot run; nothing is written.
    """
    file_type = lookup("GGUF type", kind, FILE_TYPES)
    if loaded.vlm.config.head is not None:
        raise CheckpointError(
            f"{loaded.name} has an embedding head, which GGUF has no place for; expected a model "
            "that embeds by its last hidden states. Export it in visavis' own layout instead."
        )
    path = Path(path)
    single = path.suffix == ".gguf"
    model = path if single else path / MODEL
    config = loaded.vlm.config.decoder
    name = architecture_of(config)
    if loaded.vlm.tower is not None:
        check_exportable(loaded)
    metadata: dict[str, Any] = {
        "general.architecture": name,
        "general.type": "model",
        "general.name": loaded.name,
        "general.file_type": file_type,
        "general.quantization_version": 2,
        **decoder_metadata(config, name),
        f"{name}.pooling_type": POOLING[loaded.profile.pooling],
        **vocabulary_metadata(loaded.tokenizer, loaded.specials, config.vocab_size),
        PROFILE: json.dumps(loaded.profile.to_dict(), ensure_ascii=False),
    }
    if template := chat_template(loaded.profile, _bos(loaded)):
        metadata["tokenizer.chat_template"] = template
    write_file(model, metadata, list(decoder_tensors(loaded.vlm.decoder, name, kind)))
    if loaded.vlm.tower is None:
        return [model]
    mmproj = mmproj_path(path) if single else path / MMPROJ
    write_mmproj(loaded, mmproj, kind=kind if kind in ("F32", "Q8_0") else "F16")
    return [model, mmproj]


def mmproj_path(model: Path) -> Path:
    """Return the path of the vision half that is written beside a .gguf file."""
    return model.with_name(f"mmproj-{model.name}")


def _bos(loaded: Checkpoint) -> str:
    """Return the text that every prompt begins with."""
    number = loaded.specials.bos_id
    if number is None or not loaded.specials.add_bos:
        return ""
    return loaded.tokenizer.id_to_token(number) or ""


def architecture_of(config: DecoderConfig) -> str:
    """Return the `general.architecture` that computes what a decoder computes.

    Raises:
        CheckpointError: llama.cpp has none; what it lacks is named.
    """
    for name, architecture in ARCHITECTURES.items():
        if not _misfits(config, name, architecture):
            return name
    nearest = min(ARCHITECTURES, key=lambda n: len(_misfits(config, n, ARCHITECTURES[n])))
    found = ", ".join(_misfits(config, nearest, ARCHITECTURES[nearest]))
    raise CheckpointError(
        f"the decoder has {found}, which is no language model that llama.cpp runs and that can be "
        f"written here ({', '.join(ARCHITECTURES)}; the nearest is {nearest!r}). Export it in "
        "transformers' layout instead."
    )


def _misfits(config: DecoderConfig, name: str, architecture: Architecture) -> list[str]:
    """Return the settings of a decoder that an architecture does not have."""
    plain = {"norm": "rms", "activation": "silu", "gated": True, "qk_norm": False}
    fixed: dict[str, Any] = plain | architecture.switches | {"mrope_sections": ()}
    biases = ("qkv_bias", "out_bias", "ffn_bias", "head_bias")
    fixed |= dict.fromkeys(biases, name == "phi2")
    if name == "qwen2":
        fixed["qkv_bias"] = True
    elif name == "llama":  # with biases of q, k and v alone it is a qwen2
        fixed |= {"qkv_bias": config.out_bias, "out_bias": config.out_bias, "rope_fraction": 1.0}
    elif name == "stablelm":
        fixed |= {"qkv_bias": config.qkv_bias, "parallel_block": config.parallel_block}
    elif name in ("gemma", "openelm"):
        fixed["tied_head"] = True
    if name not in ("phi2", "stablelm"):
        fixed["parallel_block"] = False
    fixed["embedding_scale"] = math.sqrt(config.width) if architecture.scaled_embedding else 1.0
    fixed["sliding_window"] = config.sliding_window if architecture.windowed else 0
    found = [
        f"{field}={getattr(config, field)!r}"
        for field, value in fixed.items()
        if getattr(config, field) != value
    ]
    if name != "phi3" and _is_longrope(config.rope_scaling):
        found.append("rope_scaling of Phi-3")
    return found


def _is_longrope(scaling: RopeScaling | None) -> bool:
    return scaling is not None and scaling.kind == "factors" and scaling.magnitude != 1


def decoder_metadata(config: DecoderConfig, name: str) -> dict[str, Any]:
    """Return the keys of one architecture: the inverse of `decoder.decoder_config`."""

    def listed(value: PerLayer) -> int | list[int]:
        return list(value) if isinstance(value, tuple) else value

    epsilon = "layer_norm_rms_epsilon" if config.norm == "rms" else "layer_norm_epsilon"
    keys: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.context_length,
        "embedding_length": config.width,
        "block_count": config.num_layers,
        "feed_forward_length": listed(config.ffn_width),
        "attention.head_count": listed(config.num_heads),
        "attention.head_count_kv": listed(config.num_kv_heads),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        f"attention.{epsilon}": float(config.norm_eps),
        "rope.dimension_count": config.rotary_dim,
        "rope.freq_base": float(config.rope_base),
    }
    if name == "stablelm":
        keys["use_parallel_residual"] = config.parallel_block
    if config.sliding_window:
        keys["attention.sliding_window"] = config.sliding_window
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}
    if scaling is not None and _is_longrope(scaling):
        keys["rope.scaling.attn_factor"] = float(scaling.magnitude)
        keys["rope.scaling.original_context_length"] = scaling.original_context
    return {f"{name}.{key}": value for key, value in keys.items()}


def decoder_tensors(decoder: Decoder, name: str, kind: str) -> Iterator[NewTensor]:
    """Yield a decoder's tensors as they are to be written, none of them made yet."""
    config = decoder.config
    found = ARCHITECTURES[name]
    layout = TensorLayout(found.rotary_pairs, bool(found.fused_qkv), found.fused_up)
    yield from _rope_tensors(config)
    for ours, at, part in split_rows(config, layout):
        shape = shape_of(part, config)
        type = tensor_type(part.name, shape, kind, config.num_layers, config.tied_head)

        def pieces(
            ours: str = ours, at: slice = at, rotary: bool = part.rotary, type: str = type
        ) -> Iterator[np.ndarray]:
            tensor = weight(decoder, ours.removeprefix("decoder."))[at]
            if rotary:  # rows move, so they are made at once
                return quantize(side_by_side(as_numpy(tensor), config.head_dim), type)
            if config.norm_offset and ours.endswith("norm.weight"):
                tensor = tensor + config.norm_offset
            return quantized(tensor, type)

        yield NewTensor(part.name, shape, type, pieces)


def _rope_tensors(config: DecoderConfig) -> Iterator[NewTensor]:
    """Yield the divisors of rotary frequencies, where there are any."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind == "linear":
        return
    array = np.array(scaling.factors, np.float32)
    if scaling.kind == "llama3":  # its rule reads the frequencies; what comes out are divisors
        exponent = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim
        plain = 1.0 / config.rope_base**exponent
        array = (plain / scaled(plain, scaling)).numpy()
    # Ours are the first context's; a prompt beyond it is refused, so both are the same.
    names = (SHORT_FACTORS, LONG_FACTORS) if _is_longrope(scaling) else (ROPE_FACTORS,)
    for name in names:
        yield NewTensor(name, array.shape, "F32", lambda: [array])


BYTE_TEXT = re.compile("<0x[0-9A-F]{2}>")
# Digits in runs, words of several scripts and cases, contractions, signs, blanks, line ends.
PROBE = (
    "Hello, World! I'll say we've DON'T it's 3.14159 + 1234567 = €9,50;  two  blanks\n\n\tTab "
    "camelCase HTTPServer naïve Straße Ελληνικά русский 日本語テキスト 한국어 हिन्दी العربية 👍🏽 "
    "x=[1,2]; // url: https://a.b/c?d=e&f#g … «quoted» `code` $x^2$ \r\n  end \n "
)

SMALLEST = {  # what makes a tokenizer, to see how it cuts
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["a", "b", "ab"],
    "tokenizer.ggml.merges": ["a b"],
}


def vocabulary_metadata(
    tokenizer: Tokenizer, specials: SpecialTokens, num_tokens: int
) -> dict[str, Any]:
    """Return the `tokenizer.ggml` keys of a tokenizer.

    Args:
        num_tokens: rows of the model's embeddings; ids without a token become unused ones.

    Raises:
        CheckpointError: GGUF has no way to say how the tokenizer cuts or joins text.
    """
    data = json.loads(tokenizer.to_str())
    model = data["model"]
    of_bytes = '"ByteLevel"' in json.dumps((data["pre_tokenizer"], data["decoder"]))
    if model["type"] != "BPE" or not (of_bytes or model.get("byte_fallback")):
        raise _refusal(f"is a {model['type']}", "BPE of bytes, or SentencePiece's with bytes")
    by_id = {number: text for text, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(num_tokens)]
    types = [NORMAL if number in by_id else UNUSED for number in range(num_tokens)]
    for number, token in tokenizer.get_added_tokens_decoder().items():
        types[number] = CONTROL if token.special else USER_DEFINED
    found: dict[str, Any] = {"tokenizer.ggml.tokens": tokens}
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    if not of_bytes:
        unknown = model.get("unk_token")
        types = [
            BYTE if BYTE_TEXT.fullmatch(text) else kind
            for text, kind in zip(tokens, types, strict=True)
        ]
        if unknown is not None:
            types[model["vocab"][unknown]] = UNKNOWN
            found["tokenizer.ggml.unknown_token_id"] = model["vocab"][unknown]
        found |= {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": _scores(tokens, merges),
            "tokenizer.ggml.add_space_prefix": tokenizer.encode("a", add_special_tokens=False)
            .tokens[0]
            .startswith("▁"),
        }
    else:
        found |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _cut_name(tokenizer, bool(model.get("ignore_merges"))),
            "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        }
    found["tokenizer.ggml.token_type"] = np.array(types, np.int32)
    ends = [number for number in specials.eot_ids if number != specials.eos_id]
    ids = {"bos": specials.bos_id, "eos": specials.eos_id, "padding": specials.pad_id}
    ids["eot"] = ends[0] if ends else None
    found |= {f"tokenizer.ggml.{k}_token_id": n for k, n in ids.items() if n is not None}
    found["tokenizer.ggml.add_bos_token"] = specials.add_bos
    if specials.appended not in ((), (specials.eos_id,)):
        texts = [tokenizer.id_to_token(number) for number in specials.appended]
        raise _refusal(f"appends {', '.join(map(repr, texts))} to a text", "nothing or eos")
    found["tokenizer.ggml.add_eos_token"] = bool(specials.appended)
    _check(tokenizer, found)
    return found


def _scores(tokens: list[str], merges: Iterable[list[str]]) -> np.ndarray:
    """Return SentencePiece's scores: minus a token's rank among what merges make.

    Merges are in order of the score of what they make, so that order brings the scores back.
    """
    rank: dict[str, int] = {}
    for left, right in merges:
        rank.setdefault(left + right, len(rank))
    lowest = -float(len(rank))
    return np.array([-float(rank[t]) if t in rank else lowest for t in tokens], np.float32)


def _cut_name(tokenizer: Tokenizer, whole_words: bool) -> str:
    """Return llama.cpp's name of the way in which a byte-level tokenizer cuts text."""
    cut = tokenizer.pre_tokenizer
    pieces = None if cut is None else [text for text, _ in cut.pre_tokenize_str(PROBE)]
    for name, kind in PRE_TOKENIZERS.items():
        like_it = build_tokenizer({**SMALLEST, "tokenizer.ggml.pre": name}).pre_tokenizer
        assert like_it is not None
        found = [text for text, _ in like_it.pre_tokenize_str(PROBE)]
        if found == pieces and kind.whole_words == whole_words:
            return name
    known = ", ".join(PRE_TOKENIZERS)
    raise _refusal("cuts text in a way that llama.cpp has no name for", f"that of one of: {known}")


def _check(tokenizer: Tokenizer, metadata: dict[str, Any]) -> None:
    """Refuse metadata that does not give the tokenizer's ids."""
    again = build_tokenizer(metadata)
    for text in (PROBE, PROBE.upper(), " ".join(reversed(PROBE.split()))):
        ours = tokenizer.encode(text, add_special_tokens=False)
        theirs = again.encode(text, add_special_tokens=False)
        pairs = zip_longest(ours.tokens, theirs.tokens)
        if ours.ids != theirs.ids:
            one, other = next(pair for pair in pairs if pair[0] != pair[1])
            raise _refusal(
                f"gives {one!r} where GGUF's would give {other!r}",
                "steps that GGUF has: no normalising, no other way of joining",
            )


def _refusal(found: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"the tokenizer {found}, expected {expected}; it cannot be written to GGUF. Export the "
        "model in transformers' layout instead."
    )


# ---- chat template ---------------------------------------------------------------------------


def chat_template(profile: PromptConfig, bos: str) -> str:
    """Return a jinja chat template that writes a profile's turns; empty where there are none.

    Of the formats in `processing/chat_formats.py` only `plain`, which leaves the user's words out,
    has none.

    Args:
        bos: what every conversation begins with.
    """
    if not profile.chat_template:
        return profile.jinja
    turns = lookup("chat template", profile.chat_template, CHAT_FORMATS)
    if any(turn.images_only for turn in turns.turns.values()):
        return ""
    image = (turns.image_start + profile.image_start, profile.image_end + turns.image_end)
    return _jinja(turns, bos, _content(*image))


def _jinja(template: ChatFormat, bos: str, content: str) -> str:
    """Return jinja that renders turns as `templates.encode_turns` does.

    Args:
        content: an expression, what a message says.
    """

    def around(turn: Turn, text: str) -> str:
        before, after = _quoted(turn.start + turn.gap), _quoted(turn.end + turn.after)
        return f"{{{{ {before} + {text} + {after} }}}}"

    pieces = [f"{{{{ {_quoted(bos + template.before)} }}}}"]
    if template.system:
        own = around(template.turns["system"], _quoted(template.system))
        absent = "not messages or messages[0]['role'] != 'system'"
        pieces.append(f"{{% if {absent} %}}{own}{{% endif %}}")
    pieces.append("{% set seen = namespace(user=false) %}{% for message in messages %}")
    word = "if"
    for role, turn in template.turns.items():
        body = around(turn, content)
        if role == "user" and template.first_user is not None:
            first = around(template.first_user, content)
            once = "{% set seen.user = true %}"
            body = f"{{% if seen.user %}}{body}{{% else %}}{first}{once}{{% endif %}}"
        pieces.append(f"{{% {word} message['role'] == '{role}' %}}{body}")
        word = "elif"
    generation = _quoted(template.turns["assistant"].start)
    pieces.append("{% else %}{{ raise_exception('no such role in this chat format') }}")
    pieces.append("{% endif %}{% endfor %}")
    pieces.append(f"{{% if add_generation_prompt %}}{{{{ {generation} }}}}{{% endif %}}")
    return "".join(pieces)


def _content(image_start: str, image_end: str) -> str:
    """Return the expression of a message's text, with what belongs beside its images."""
    text = "message['content']"
    if image_start:
        text += f" | replace({_quoted(MARK_START)}, {_quoted(image_start + MARK_START)})"
    if image_end:
        text += f" | replace({_quoted(MARK_END)}, {_quoted(MARK_END + image_end)})"
    return f"({text})"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
