"""Tokenizers, built into the `tokenizers` library from GGUF metadata or a model's folder.

GPT-2 style BPE and SentencePiece BPE. Ids are those of llama.cpp and of the model's own tokenizer.
The module takes the metadata dict of a GGUF file and does not read the file itself.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from tokenizers import (
    AddedToken,
    Encoding,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from visavis.errors import CheckpointError
from visavis.processing.tokenizer_check import no_panic, read_tokenizer
from visavis.processing.tokenizer_conversion import (
    BYTE,
    CONTROL,
    END_TEXTS,
    NORMAL,
    PRE_TOKENIZERS,
    UNKNOWN,
    USER_DEFINED,
    merges_from_scores,
    read_sentencepiece,
)
from visavis.processing.unigram import RULES, siglip_json, with_rules
from visavis.utils import parse_json, suggest

# Qwen2-VL's marks of things and places in a picture: users write them, and they end nothing.
MARKS = {f"<|{what}_{end}|>" for what in ("object_ref", "box", "quad") for end in ("start", "end")}


@dataclass(frozen=True)
class SpecialTokens:
    """Ids with a meaning. What `pattern` finds in a user's text never becomes one of them.

    Attributes:
        eot_ids: every id that ends a turn, eos included.
        add_bos: the tokenizer puts bos before a text.
        appended: ids that the tokenizer puts after a text, such as eos; not used in chat.
    """

    bos_id: int | None
    eos_id: int | None
    eot_ids: tuple[int, ...]
    pad_id: int | None
    add_bos: bool
    by_text: dict[str, int] = field(default_factory=dict, hash=False)
    appended: tuple[int, ...] = ()

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """A pattern for special texts but `MARKS`, longest first; matches nothing if none."""
        texts = sorted(self.by_text.keys() - MARKS, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


def encode(
    tokenizer: Tokenizer, specials: SpecialTokens, text: str, parse_special: bool = True
) -> list[int]:
    """Return the ids of a text; nothing is added around it.

    Args:
        parse_special: turn special tokens' texts into their ids; if not, they are plain text.
    """
    ids: list[int] = _encoding(tokenizer, specials, text, parse_special).ids
    return ids


def encode_spans(
    tokenizer: Tokenizer, specials: SpecialTokens, text: str, parse_special: bool = True
) -> list[tuple[int, tuple[int, int]]]:
    """Return the ids of a text as `encode` does, each with the characters it stands for."""
    found = _encoding(tokenizer, specials, text, parse_special)
    return list(zip(found.ids, found.offsets, strict=True))


def _encoding(
    tokenizer: Tokenizer, specials: SpecialTokens, text: str, parse_special: bool
) -> Encoding:
    if not parse_special and specials.pattern.search(text):
        tokenizer = _literal_twin(tokenizer)
    with no_panic("encoding a text"):
        return tokenizer.encode(text, add_special_tokens=False)


_TWINS: WeakKeyDictionary[Tokenizer, Tokenizer] = WeakKeyDictionary()


def _literal_twin(tokenizer: Tokenizer) -> Tokenizer:
    """Return a copy that reads special texts as plain text.

    A copy, because the switch is the tokenizer's own state and other threads may be encoding.
    """
    twin = _TWINS.get(tokenizer)
    if twin is None:
        twin = copy.deepcopy(tokenizer)
        twin.encode_special_tokens = True
        _TWINS[tokenizer] = twin
    return twin


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer that a GGUF file's metadata describes.

    Raises:
        CheckpointError: no vocabulary, an inconsistent one, or a kind not known here.
    """
    builders = {"gpt2": _build_bpe, "llama": _build_sentencepiece}
    kind = _get(metadata, "model", str, "")
    if kind not in builders:
        raise CheckpointError(
            f"the file's tokenizer is of kind {kind!r}, expected one of {', '.join(builders)}; "
            "its vocabulary needs another algorithm and cannot be used"
        )
    tokens, types = _vocabulary(metadata)
    try:
        with no_panic("building it"):
            tokenizer = builders[kind](metadata, tokens, types)
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(
            f"the file's vocabulary does not make a tokenizer ({error}); expected merges whose "
            "parts and results are tokens; it was converted wrongly, try another source"
        ) from error
    added = [
        AddedToken(text, special=kind != USER_DEFINED, normalized=False)
        for text, kind in zip(tokens, types, strict=True)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens([token for token in added if token.content])
    specials = special_tokens(metadata)
    before = [specials.bos_id] if specials.add_bos and specials.bos_id is not None else []
    if around := {*before, *specials.appended}:
        start, end = ([tokens[number] for number in ids] for ids in (before, specials.appended))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*start, "$A", *end],
            pair=[*start, "$A", "$B", *end],
            special_tokens=[(tokens[number], number) for number in around],
        )
    return tokenizer


def special_tokens(metadata: Mapping[str, Any]) -> SpecialTokens:
    """Return the special ids of a GGUF file's metadata.

    Raises:
        CheckpointError: no vocabulary, or an inconsistent one.
    """
    tokens, types = _vocabulary(metadata)
    sentencepiece = _get(metadata, "model", str, "") == "llama"

    def number(name: str, default: int | None = None) -> int | None:
        value = _get(metadata, f"{name}_token_id", int, default)
        return value if value is not None and 0 <= value < len(tokens) else None

    by_text = {text: i for i, text in enumerate(tokens) if types[i] in (UNKNOWN, CONTROL) and text}
    bos, eos = number("bos", 1), number("eos", 2)
    if not sentencepiece:
        bos, eos = number("bos"), number("eos")
    ends = [eos, number("eot"), number("eom")]
    ends += [by_text[text] for text in sorted(END_TEXTS & by_text.keys())]
    kind = PRE_TOKENIZERS.get(_get(metadata, "pre", str, "default"))
    add_bos = sentencepiece or (kind is not None and kind.add_bos)
    return SpecialTokens(
        bos_id=bos,
        eos_id=eos,
        eot_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
        pad_id=number("padding", eos),
        add_bos=_get(metadata, "add_bos_token", bool, add_bos),
        by_text=by_text,
        appended=(eos,) if eos is not None and _get(metadata, "add_eos_token", bool) else (),
    )


# The first that is there is read; beside vocab.json stands merges.txt.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
# How the classes that wrote vocab.json cut text, and what they do to it first.
CLASSES: dict[str, tuple[str, normalizers.Normalizer | None]] = {
    "GPT2Tokenizer": ("gpt-2", None),
    "CodeGenTokenizer": ("gpt-2", None),
    "Qwen2Tokenizer": ("qwen2", normalizers.NFC()),
}


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def tokenizer_file(folder: Path) -> Path:
    """Return the file that a folder's tokenizer is read from.

    Raises:
        CheckpointError: there is none.
    """
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(
        f"{folder} has none of {', '.join(TOKENIZER_FILES)}, expected the tokenizer that belongs "
        "to its weights; copy it from the model's source"
    )


def load_tokenizer(folder: str | Path) -> tuple[Tokenizer, SpecialTokens]:
    """Load `tokenizer.json`, else `tokenizer.model`, else `vocab.json` and `merges.txt`, else
    SigLIP's `spiece.model`, with the special tokens that the files beside it name.

    Raises:
        CheckpointError: all are absent, or one cannot be read.
    """
    folder = Path(folder)
    path = tokenizer_file(folder)
    config: dict[str, Any] = {}
    for name in ("special_tokens_map", "tokenizer_config"):
        found = _json(folder / f"{name}.json")
        config |= {key: value for key, value in found.items() if value is not None}
    if path.name == "spiece.model":
        tokenizer = read_tokenizer(path, siglip_json(path, config))
    elif path.suffix == ".model":
        tokenizer, config = _load_sentencepiece(path, config)
    elif path.name == "vocab.json":
        tokenizer = _load_byte_level(path, config)
    else:
        rules = RULES.get(str(config.get("tokenizer_class")), [])
        tokenizer = read_tokenizer(path, with_rules(path, rules) if rules else None)
    added = tokenizer.get_added_tokens_decoder()
    by_text = {token.content: number for number, token in added.items() if token.special}

    def number(key: str) -> int | None:
        text = _text(config.get(key))
        return None if text is None else tokenizer.token_to_id(text)

    eos = number("eos_token")
    generation = _json(folder / "generation_config.json").get("eos_token_id", [])
    ends = [eos, *(generation if isinstance(generation, list) else [generation])]
    ends += [by_text[text] for text in sorted(END_TEXTS & by_text.keys())]
    pad, bos = number("pad_token"), number("bos_token")
    bos = number("cls_token") if bos is None else bos  # BERT's name
    before, appended = _around(tokenizer)
    if before and before != [bos]:
        names = [tokenizer.id_to_token(one) for one in before]
        raise CheckpointError(
            f"{path} puts {', '.join(map(repr, names))} before every text, expected nothing or the "
            f"bos_token of tokenizer_config.json ({config.get('bos_token')!r}); the two files "
            "belong to different models, or this kind of tokenizer is not read here"
        )
    return tokenizer, SpecialTokens(
        bos_id=bos,
        eos_id=eos,
        eot_ids=tuple(dict.fromkeys(end for end in ends if isinstance(end, int))),
        pad_id=eos if pad is None else pad,
        add_bos=bool(before),
        by_text=by_text,
        appended=tuple(appended),
    )


def _around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer's post-processor puts before and after a text."""
    found = tokenizer.encode("a")
    special: list[int] = found.special_tokens_mask
    if 0 not in special:
        return [], []
    first, last = special.index(0), len(special) - special[::-1].index(0)
    return found.ids[:first], found.ids[last:]


def _load_sentencepiece(path: Path, config: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """Return the tokenizer of a `tokenizer.model` with the tokens that were added to it later, and
    its settings, filled up with what the model says itself."""
    metadata = read_sentencepiece(path)
    metadata["tokenizer.ggml.add_bos_token"] = config.get("add_bos_token", True) is not False
    metadata["tokenizer.ggml.add_eos_token"] = config.get("add_eos_token") is True
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {name: metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")}
    own = {f"{name}_token": tokens[at] for name, at in ids.items() if 0 <= at < len(tokens)}
    config = own | config
    bos = _text(config.get("bos_token"))
    if bos in tokens:
        metadata["tokenizer.ggml.bos_token_id"] = tokens.index(bos)
    tokenizer = build_tokenizer(metadata)
    if metadata["tokenizer.ggml.add_space_prefix"] and config.get("legacy") is False:
        # Only the first of the texts between special tokens gets a space, not each of them.
        tokenizer.normalizer = _spaces(prefix=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    _add_tokens(tokenizer, path, config)
    return tokenizer, config


def _load_byte_level(path: Path, config: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer of `vocab.json` and `merges.txt`, GPT-2's form, with added tokens."""
    named = str(config.get("tokenizer_class")).removesuffix("Fast")
    vocabulary, merges = _json(path), path.with_name("merges.txt")
    ids = sorted(number for number in vocabulary.values() if type(number) is int)
    if named not in CLASSES or ids != [*range(len(vocabulary))]:
        raise CheckpointError(
            f"{path} holds {len(vocabulary)} tokens of a {named}, expected ids without gaps and "
            f"one of {', '.join(CLASSES)} as tokenizer_class in tokenizer_config.json; put the "
            "tokenizer.json of the same model beside it"
        )
    try:
        lines = merges.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {merges}: {error}; copy the folder again") from error
    pre, normalizer = CLASSES[named]
    found = {
        "model": "gpt2",
        "pre": pre,
        "tokens": sorted(vocabulary, key=vocabulary.__getitem__),
        "merges": [line for line in lines if line and not line.startswith("#version")],
    }
    tokenizer = build_tokenizer({f"tokenizer.ggml.{name}": value for name, value in found.items()})
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    _add_tokens(tokenizer, path, config)
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, path: Path, config: Mapping[str, Any]) -> None:
    """Add the tokens that a folder adds to its vocabulary, where their ids must come next."""
    for number, token in sorted(_added_tokens(path.parent, config).items()):
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != number:
            raise CheckpointError(
                f"{path.parent} adds {token.content!r} as token {number}, but after "
                f"{tokenizer.get_vocab_size() - 1} tokens and in order it is "
                f"{tokenizer.token_to_id(token.content)}; {path.name} belongs to another model"
            )


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Return the tokens that a folder adds to its vocabulary, by id."""
    special = {_text(config.get(f"{name}_token")) for name in ("bos", "eos", "pad", "unk")}
    try:
        special |= {_text(one) for one in config.get("additional_special_tokens", [])}
        found: dict[int, dict[str, Any]] = {
            number: {"content": text, "special": text in special}
            for text, number in _json(folder / "added_tokens.json").items()
        }
        decoder = config.get("added_tokens_decoder", {})
        found |= {int(number): settings for number, settings in decoder.items()}
        return {
            number: AddedToken(
                settings["content"],
                special=bool(settings.get("special")),
                normalized=False,
                lstrip=bool(settings.get("lstrip")),
                rstrip=bool(settings.get("rstrip")),
            )
            for number, settings in found.items()
        }
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} lists added tokens in a form that is not read ({error!r}); expected ids "
            "with their texts; copy tokenizer_config.json and added_tokens.json again"
        ) from error


def _text(token: Any) -> str | None:
    """Return the text of a token that a settings file names, plain or with its flags."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _json(path: Path) -> dict[str, Any]:
    """Return an optional JSON object beside `tokenizer.json`; absent means empty."""
    if not path.is_file():
        return {}
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; copy the folder again") from error
    return data if isinstance(data, dict) else {}


def _get(metadata: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """Return `tokenizer.ggml.<name>` if it has the right type, the default if it is absent."""
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if value is not None and type(value) is not kind:
        raise CheckpointError(
            f"'tokenizer.ggml.{name}' is of type {type(value).__name__}, expected {kind.__name__}; "
            "the file was converted wrongly, try another source"
        )
    return value


def _strings(metadata: Mapping[str, Any], name: str) -> list[str]:
    strings: list[str] | None = _get(metadata, name, list)
    if not strings or not all(isinstance(one, str) for one in strings):
        raise CheckpointError(
            f"the file has no 'tokenizer.ggml.{name}' (a list of strings); it holds weights "
            "without a whole tokenizer: convert the model again together with its tokenizer"
        )
    return strings


def _vocabulary(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Return tokens by id, and their types as llama.cpp understands them."""
    tokens = _strings(metadata, "tokens")
    stored = _get(metadata, "token_type", np.ndarray)
    types = [NORMAL] * len(tokens) if stored is None else stored.tolist()
    if len(types) != len(tokens) or len(set(tokens)) < len([t for t in tokens if t]):
        raise CheckpointError(
            f"the vocabulary has {len(tokens)} tokens, {len(set(tokens))} of them different, and "
            f"{len(types)} token types; expected different tokens with one type each; the file "
            "was converted wrongly, try another source"
        )
    # Turn ends are control tokens even where a converter forgot to say so.
    for i, text in enumerate(tokens):
        if text in END_TEXTS:
            types[i] = CONTROL
    return tokens, types


def _build_bpe(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    """GPT-2's byte-level BPE."""
    name = _get(metadata, "pre", str, "default")
    if name not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"the file cuts text in the way {name!r} (tokenizer.ggml.pre), which is not known; "
            f"{suggest(name, PRE_TOKENIZERS)} With another one the ids would be wrong"
        )
    merges = _strings(metadata, "merges")
    kind = PRE_TOKENIZERS[name]
    pairs = [(m[:cut], m[cut + 1 :]) for m in merges if (cut := m.find(" ", 1)) > 0]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=pairs,
            ignore_merges=kind.whole_words,
        )
    )
    splits = [pre_tokenizers.Split(Regex(p), behavior="isolated") for p in kind.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _build_sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int]
) -> Tokenizer:
    """SentencePiece BPE: whole text as one word, spaces as ▁, unknown characters as bytes."""
    scores = _get(metadata, "scores", np.ndarray, np.empty(0)).tolist()
    if len(scores) != len(tokens):
        raise CheckpointError(
            f"the file has {len(scores)} 'tokenizer.ggml.scores' for {len(tokens)} tokens, "
            "expected one each; convert the model again together with its tokenizer"
        )
    unknown = _get(metadata, "unknown_token_id", int, 0)
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges_from_scores(vocab, scores, types),
            unk_token=tokens[unknown] if 0 <= unknown < len(tokens) else None,
            fuse_unk=True,
            byte_fallback=BYTE in types,
        )
    )
    prefix = _get(metadata, "add_space_prefix", bool, True)
    tokenizer.normalizer = _spaces(prefix)
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _spaces(prefix: bool) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = [normalizers.Prepend("▁")] if prefix else []
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
