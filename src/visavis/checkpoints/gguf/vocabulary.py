"""A tokenizer as GGUF metadata: the inverse of `processing/tokenizer.py`.

GGUF names how text is cut (`tokenizer.ggml.pre`) instead of saying it; the name is found by
cutting a probe with each way that has one. What was written is read again and must give the
probe's ids, so a tokenizer that GGUF cannot say is refused. Knows no weights and opens no file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from visavis.errors import CheckpointError
from visavis.processing.pretokenizers import PRE_TOKENIZERS
from visavis.processing.tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SpecialTokens,
    build_tokenizer,
)

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
    found["tokenizer.ggml.add_eos_token"] = False
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
