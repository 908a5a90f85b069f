"""SentencePiece's Unigram in `spiece.model`, which SigLIP's folders have, as a tokenizer.json.

SigLIP's code writes texts in lower case and leaves out ASCII punctuation before SentencePiece sees
them (big_vision's canonicalisation), and puts `</s>` after them.
"""

from __future__ import annotations

import base64
import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visavis.errors import CheckpointError
from visavis.processing.tokenizer_conversion import (
    CHARSMAP,
    CONTROL,
    MODEL_TYPES,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    parse_sentencepiece,
    read_bounded,
)
from visavis.utils import parse_json

UNIGRAM = 1
SIGLIP_CLASS = "SiglipTokenizer"


def canonical_rules(lower: bool) -> list[dict[str, Any]]:
    """Return the normalizers of SigLIP's code, as tokenizer.json writes them."""
    signs = "".join(f"\\{sign}" for sign in string.punctuation)
    return [
        *([{"type": "Lowercase"}] if lower else []),
        {"type": "Replace", "pattern": {"Regex": f"[{signs}]"}, "content": ""},
        {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
        {"type": "Strip", "strip_left": True, "strip_right": True},
    ]


# What tokenizer classes do to a text before tokenizer.json, whose files may not say so.
RULES = {
    SIGLIP_CLASS: canonical_rules(lower=True),
    "Siglip2Tokenizer": [{"type": "Lowercase"}],
}


def with_rules(path: Path, rules: list[dict[str, Any]]) -> bytes:
    """Return a tokenizer.json with normalizers before its own; those of SigLIP change nothing where
    they stand twice.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        whole = parse_json(read_bounded(path).decode("utf-8"))
        own = whole.get("normalizer")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; copy the folder again") from error
    whole["normalizer"] = {"type": "Sequence", "normalizers": [*rules, *([own] if own else [])]}
    return json.dumps(whole).encode()


def siglip_json(path: Path, config: Mapping[str, Any]) -> bytes:
    """Return the tokenizer.json that gives SigLIP's ids.

    Args:
        config: tokenizer_config.json.

    Raises:
        CheckpointError: the file is damaged, or of another kind.
    """
    try:
        model = parse_sentencepiece(read_bounded(path))
        if model.kind != UNIGRAM:
            raise ValueError(f"it is of kind {MODEL_TYPES.get(model.kind)}, expected unigram")
        if config.get("tokenizer_class", SIGLIP_CLASS) != SIGLIP_CLASS:
            raise ValueError(f"it is of a {config['tokenizer_class']}, expected {SIGLIP_CLASS}")
        strange = {*model.types} - {NORMAL, UNKNOWN, CONTROL, USER_DEFINED}
        if strange or model.types.count(UNKNOWN) != 1 or "</s>" not in model.tokens:
            raise ValueError("expected plain pieces, one unknown and </s>")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {path} as SigLIP's tokenizer: {error}. The file is damaged, is a Git LFS "
            "pointer or holds another kind; fetch it again, or put the tokenizer.json of the same "
            "model beside it."
        ) from error
    rules = canonical_rules(config.get("do_lower_case", True) is not False)
    if charsmap := model.normalizer.get(CHARSMAP):
        encoded = base64.b64encode(charsmap).decode()
        rules.append({"type": "Precompiled", "precompiled_charsmap": encoded})
    end = model.tokens.index("</s>")
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    marks = [i for i, kind in enumerate(model.types) if kind in (UNKNOWN, CONTROL)]
    flags = {"single_word": False, "lstrip": True, "rstrip": True, "normalized": False}
    one, last = (
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "</s>", "type_id": 0}},
    )
    two = {"Sequence": {"id": "B", "type_id": 0}}
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": model.tokens[i], **flags, "special": True} for i in marks
        ],
        "normalizer": {"type": "Sequence", "normalizers": rules},
        "pre_tokenizer": space,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [one, last],
            "pair": [one, two, last],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [end], "tokens": ["</s>"]}},
        },
        "decoder": space,
        "model": {
            "type": "Unigram",
            "unk_id": model.types.index(UNKNOWN),
            "vocab": [list(pair) for pair in zip(model.tokens, model.scores, strict=True)],
            "byte_fallback": False,
        },
    }
    return json.dumps(whole).encode()
