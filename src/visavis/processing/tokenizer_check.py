"""Read tokenizer.json so that a damaged or hostile one is an error.

The `tokenizers` library panics on some files, aborts the process on others, and runs what they
describe: a few Replace rules make gigabytes of one word, a regular expression may never end. So a
file is first loaded and tried on a few texts in a child process (`bounded.py`); only what passes is
loaded here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from visavis.errors import CheckpointError
from visavis.processing import bounded

MAX_GROWTH = 4096  # characters that normalization may make of one
MAX_CUT_STEPS = 2e9  # about 10 seconds; vocabularies of 256,000 tokens take about 2e7
SECONDS = 30.0
_passed: set[bytes] = set()  # hashes of files that a child has loaded and tried
_PROBES = (
    "",
    "a",
    "Hello world! 123 times, it's naïve — 你好 🙂\n\n\tThe end.",
    "a" * 2000 + "!",
    "ab" * 1000,
    " " * 2000 + "x",
    "0" * 2000 + "a",
    "\n \t" * 700,
    "é你\u0301🙂" * 500,
    "\0\x7f\ufeff\u2028\ufffd",
    "<s></s><|x|>" * 200,
)


def read_tokenizer(path: Path, made: bytes | None = None) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json.

    Args:
        made: the tokenizer.json that was made of a file in another form; None: the path is one.

    Raises:
        CheckpointError: it cannot be read, or takes too much time or memory.
    """
    try:
        return _checked(path.read_bytes() if made is None else made)
    except (OSError, CheckpointError, bounded.BoundExceededError) as error:
        reason = str(error)
    except Exception as error:  # tokenizers' bare Exception
        reason = f"{error}"
    raise CheckpointError(
        f"cannot read {path}: {reason}. Expected the tokenizer that belongs to the weights in this "
        "folder; copy the folder again, tokenizer.json included"
    )


def _checked(content: bytes) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json's bytes, tried in a child first.

    Raises:
        CheckpointError, BoundExceededError, Exception: it cannot be read, or takes too much.
    """
    digest = hashlib.blake2b(content).digest()
    if digest not in _passed:
        memory = (1 << 30) + 32 * len(content)
        function = "visavis.processing.tokenizer_check:try_tokenizer"
        bounded.call(function, seconds=SECONDS, memory=memory, data=content)
        _passed.add(digest)
    with no_panic("loading it"):
        tokenizer = Tokenizer.from_buffer(content)
        tokenizer.no_padding()  # of a training run; encoding must not obey them
        tokenizer.no_truncation()
        return tokenizer


@contextmanager
def no_panic(doing: str) -> Iterator[None]:
    """Raise a panic of the Rust library, which is a BaseException, as CheckpointError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"the tokenizer fails in {doing} ({str(error)[:200]}); its file is damaged: copy it "
            "from the model's source again"
        ) from None


def check_lengths(tokens: Collection[str]) -> None:
    """Check that all ways to cut every token in two can be tried.

    Raises:
        CheckpointError: they cannot.
    """
    steps = sum(len(token) ** 2 for token in tokens)
    if steps > MAX_CUT_STEPS:
        raise CheckpointError(
            f"the longest of {len(tokens)} tokens has {max(map(len, tokens))} characters, and "
            f"cutting each in two takes {steps:.2g} steps, expected at most {MAX_CUT_STEPS:.2g}; "
            "the vocabulary is damaged, try another source"
        )


def try_tokenizer(content: bytes) -> tuple[None, bytes]:
    """Load a tokenizer, encode and decode a few texts; runs in the child."""
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:
        raise CheckpointError(" ".join(str(error).split())[:300]) from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    for part in (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder):
        grown = 1 if part is None else _growth(json.loads(part.__getstate__()))
        if grown > MAX_GROWTH:
            raise CheckpointError(
                f"its rules make {grown:,} characters of one, expected at most {MAX_GROWTH}"
            )
    for text in _PROBES:
        for special in (False, True):
            tokenizer.encode(text, add_special_tokens=special)
    count = tokenizer.get_vocab_size()
    for ids in ([*range(min(count, 512))], [*range(max(0, count - 512), count)]):
        tokenizer.decode(ids, skip_special_tokens=False)
        tokenizer.decode(ids, skip_special_tokens=True)
    return None, b""


def _growth(part: Any) -> int:
    """Return how many characters the rules of a component make of one, at most."""
    if isinstance(part, list):
        grown = 1
        for one in part:
            grown = min(grown * _growth(one), 1 << 62)
        return grown
    if not isinstance(part, dict):
        return 1
    added = [part[key] for key in ("content", "prepend", "replacement") if key in part]
    grown = max([1, *(len(text) for text in added if isinstance(text, str))])
    inner = [value for value in part.values() if isinstance(value, (list, dict))]
    return grown * _growth(inner)
