"""Whether a conversion answers as its source does.

Both are asked the same (`probes.py`): vectors are compared by cosine, the next token by KL
divergence. What was written is opened by the program that it is for, if that is installed
(`peers.py`), and else, or beside it, by us again. Knows no layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

from visavis.api import Model
from visavis.checkpoints.load import load_checkpoint
from visavis.checkpoints.loaded import INTEGERS
from visavis.convert.peers import PEERS
from visavis.convert.probes import Answer, Probe, cosine, divergence, probes
from visavis.convert.run import Conversion
from visavis.convert.targets import TARGETS

# Least cosine and largest KL by what the weights are stored in. Several times what rounding does to
# nano and SmolLM2-135M, whose numbers are in docs/convert.md.
LIMITS = {"f32": (0.9999, 1e-3), "bf16": (0.99, 0.05), "f16": (0.99, 0.05)}
LIMITS |= dict.fromkeys(INTEGERS, LIMITS["bf16"])  # both sides hold the same integers
KINDS = {"F32": LIMITS["f32"], "F16": LIMITS["f16"], "BF16": LIMITS["bf16"], "Q8_0": (0.99, 0.05)}
FEWER_BITS = (0.8, 1.0)


@dataclass(frozen=True)
class Check:
    """One probe's answers, compared."""

    name: str
    cosine: float | None
    kl: float | None
    same: bool


@dataclass(frozen=True)
class Verdict:
    """All of it.

    Attributes:
        asked: who opened what was written.
        reason: why it is not the same; empty if it is.
    """

    asked: str
    min_cosine: float
    max_kl: float
    checks: list[Check] = field(default_factory=list)
    reason: str = ""

    @property
    def same(self) -> bool:
        return not self.reason

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "same": self.same}


def verify(done: Conversion) -> Verdict:
    """Compare a conversion with the model that it was written from."""
    min_cosine, max_kl = limits(done.precision, done.kind)
    asked = probes(done.loaded.vlm.tower is not None)
    expected = answers(Model(done.loaded), asked)
    peer = TARGETS[done.target].peer
    checks: list[Check] = []
    names = []
    try:
        if peer and find_spec(peer):
            name, ask = PEERS[peer]
            names.append(name)
            found = ask(done.out, done.precision, asked, expected)
            checks += _compare(name, asked, expected, found, min_cosine, max_kl)
        if done.target != "sentence-transformers" or not names:
            names.append("visavis again")
            found = answers(_reload(done), asked)
            checks += _compare("visavis", asked, expected, found, min_cosine, max_kl)
    except Exception as error:  # whatever a peer raises on what it cannot open
        reason = f"{names[-1]} cannot use it ({type(error).__name__}: {error})"
        return Verdict(" and ".join(names), min_cosine, max_kl, checks, reason)
    different = [check.name for check in checks if not check.same]
    return Verdict(" and ".join(names), min_cosine, max_kl, checks, ", ".join(different))


def limits(precision: str, kind: str) -> tuple[float, float]:
    """Return the least cosine and the largest KL divergence of a right conversion.

    Args:
        kind: the type of a GGUF file's tensors, if it is one.
    """
    stored = KINDS.get(kind, FEWER_BITS) if kind else LIMITS[precision]
    return max(LIMITS[precision], stored, key=lambda limit: limit[1])


def answers(model: Model, asked: Sequence[Probe]) -> list[Answer]:
    """Return what one of our models makes of each probe it can take."""
    found = []
    for probe in asked:
        if probe.image is not None and not model.takes_images:
            found.append(Answer())
            continue
        trace = model.trace(probe.item)
        found.append(
            Answer(
                vector=model.embed([probe.item])[0],
                hidden=trace.hidden[-1],
                log_probs=torch.from_numpy(trace.logits[-1]).log_softmax(-1).numpy(),
                token_ids=tuple(trace.token_ids.tolist()),
            )
        )
    return found


def _reload(done: Conversion) -> Model:
    """Load what was written; a GGUF file with its vision half, in the chat format of the source."""
    beside = done.files[1] if done.out.is_file() and len(done.files) > 1 else None
    loaded = load_checkpoint(
        done.out,
        precision=done.precision,
        device="cpu",
        turns=done.loaded.profile.turns,
        vision_tower=beside,
    )
    return Model(loaded)


def _compare(
    who: str,
    asked: Sequence[Probe],
    expected: Sequence[Answer],
    found: Sequence[Answer],
    min_cosine: float,
    max_kl: float,
) -> list[Check]:
    """Return a check for each probe that was answered."""
    checks = []
    for probe, first, second in zip(asked, expected, found, strict=True):
        if second.is_empty:
            continue
        near, kl = cosine(first, second), divergence(first, second)
        same = (near is None or near >= min_cosine) and (kl is None or kl <= max_kl)
        checks.append(Check(f"{who}: {probe.name}", near, kl, same))
    return checks
