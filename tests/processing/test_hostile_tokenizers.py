"""Tokenizer files that panic, abort, allocate or never end are one error; the next one loads."""

from __future__ import annotations

import json
import resource

import pytest
from tokenizers import Tokenizer, models

from visavis.errors import CheckpointError
from visavis.processing import bounded, tokenizer_check
from visavis.processing.tokenizer import load_tokenizer
from visavis.processing.tokenizer_check import no_panic, read_tokenizer
from visavis.processing.tokenizer_conversion import merges_from_scores


def plain(**parts) -> dict:
    """A tokenizer.json of single characters, with other parts in place of its own."""
    vocab = {character: number for number, character in enumerate("abcdefgh !")}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    return json.loads(tokenizer.to_str()) | parts


def sequence(kind: str, members: list) -> dict:
    return {"type": "Sequence", kind: members}


def replace(pattern: str, content: str) -> dict:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def split(regex: str) -> dict:
    behaviour = {"behavior": "Isolated", "invert": False}
    return {"type": "Split", "pattern": {"Regex": regex}, **behaviour}


def nested(depth: int) -> str:
    inner = '{"type": "Sequence", "normalizers": ['
    return inner * depth + "]}" * depth


HOSTILE = {
    "empty": b"",
    "not JSON": b"\x80\x04]q\x00.",
    "JSON of another kind": b"[1, 2, 3]",
    "no model": b"{}",
    "cut off": json.dumps(plain()).encode()[:-40],
    "doubled 40 times": plain(
        normalizer=sequence("normalizers", [replace("a", "aa"), replace("b", "bb")] * 20)
    ),
    "doubled 40 times, one letter that no probe holds": plain(
        normalizer=sequence("normalizers", [replace("ж", "жж")] * 40)
    ),
    "one letter made a million": plain(normalizer=replace("ж", "x" * 10**6)),
    "a prefix of a million": plain(normalizer={"type": "Prepend", "prepend": "x" * 10**6}),
    "growth in the decoder": plain(decoder=sequence("decoders", [replace("a", "aa")] * 40)),
    "regex that backtracks": plain(pre_tokenizer=split(r"(a+)+$")),
    "regex that backtracks twice": plain(pre_tokenizer=split(r"(a|a)*(a|a)*(a|a)*$")),
    "regex of spaces": plain(pre_tokenizer=split(r"(\s|\s)+(\s|\s)+$")),
    "regex that is none": plain(pre_tokenizer=split(r"(")),
    "normalizers nested 100,000 deep": (
        json.dumps(plain(normalizer="@")).replace('"@"', nested(100_000)).encode()
    ),
    "normalizers nested 120 deep": (
        json.dumps(plain(normalizer="@")).replace('"@"', nested(120)).encode()
    ),
    "a charsmap that is none": plain(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    ),
    "a charsmap with a wild length": plain(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "/////////////w=="}
    ),
    "a model of no kind": plain(model={"type": "Unknown"}),
    "Unigram with an unknown id outside": plain(
        model={"type": "Unigram", "unk_id": 10**9, "vocab": [["a", -1.0]], "byte_fallback": False}
    ),
    "Unigram without a vocabulary": plain(
        model={"type": "Unigram", "unk_id": 0, "vocab": [], "byte_fallback": False}
    ),
    "merges of tokens that are not there": plain(
        model={"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "zz"]]}
    ),
    "an id beyond 32 bits": plain(model={"type": "BPE", "vocab": {"a": 2**33}, "merges": []}),
    "a negative id": plain(model={"type": "BPE", "vocab": {"a": -1}, "merges": []}),
    "a post-processor without its tokens": plain(
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    ),
}


def file_of(data: bytes | dict, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return path


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_tokenizer_is_one_error(data, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_check, "SECONDS", 0.5)
    before = resource.getrusage(resource.RUSAGE_SELF)
    file_of(data, tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot read .*tokenizer\.json: "):
        load_tokenizer(tmp_path)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_maxrss - before.ru_maxrss < 200 << 10
    assert after.ru_utime - before.ru_utime < 2
    file_of(plain(), tmp_path)
    assert load_tokenizer(tmp_path)[0].encode("abc").ids == [0, 1, 2]


HARMLESS = {
    "truncation and padding": plain(
        truncation={"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 9},
        padding={
            "strategy": {"Fixed": 10**12},
            "direction": "Right",
            "pad_to_multiple_of": 0,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "a",
        },
    ),
}


@pytest.mark.parametrize("data", HARMLESS.values(), ids=HARMLESS)
def test_settings_that_only_matter_when_obeyed(data, tmp_path):
    """Padding to 10^12 aborts the process if it is obeyed; both blocks are switched off."""
    tokenizer = read_tokenizer(file_of(data, tmp_path))
    assert tokenizer.encode("abc").ids == [0, 1, 2]


def test_a_file_is_tried_once(tmp_path, monkeypatch):
    path = file_of(plain(), tmp_path)
    read_tokenizer(path)
    monkeypatch.setattr(bounded, "call", None)
    assert read_tokenizer(path).get_vocab_size() == 10


@pytest.mark.parametrize(
    "part",
    [
        {"normalizer": {"type": "NFKC"}},
        {"normalizer": sequence("normalizers", [replace(" ", "▁"), {"type": "Lowercase"}])},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}},
        {"decoder": sequence("decoders", [replace("▁", " "), {"type": "Fuse"}])},
    ],
)
def test_usual_parts_are_taken(part, tmp_path):
    assert read_tokenizer(file_of(plain(**part), tmp_path)).to_str()


def test_panics_are_errors():
    class PanicException(BaseException):
        """What pyo3 calls them; the class itself cannot be imported."""

    with pytest.raises(CheckpointError, match="fails in decoding"), no_panic("decoding"):
        raise PanicException("index out of bounds")
    with pytest.raises(KeyboardInterrupt), no_panic("decoding"):
        raise KeyboardInterrupt


def test_long_tokens_are_bounded():
    tokens = {"a": 0, "a" * 100_000: 1}
    with pytest.raises(CheckpointError, match=r"has 100000 characters.*expected at most 2e\+09"):
        merges_from_scores(tokens, [0.0, -1.0], [1, 1])
