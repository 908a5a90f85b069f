"""What a model and its conversion are both asked, and how answers are compared.

A few texts and drawn pictures, always the same. Knows no model and no layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

TEXTS = (
    "A cup of coffee stands on a wooden table.",
    "猫が窓のそばで寝ています。  12:30 — déjà midi ?",
    "def area(radius):\n    return 3.14159 * radius**2\n",
    "Name three colours of the rainbow, separated by commas.",
)
QUESTION = "What is in this picture?"


@dataclass(frozen=True)
class Probe:
    """One thing that is asked: a text, or a picture with one."""

    name: str
    text: str
    image: Image.Image | None = None

    @property
    def item(self) -> Any:
        """The probe as `Model.embed` takes it."""
        if self.image is None:
            return self.text
        return {"image": self.image, "text": self.text}


@dataclass(frozen=True)
class Answer:
    """What a model makes of a probe, as far as it says.

    Attributes:
        vector: what it embeds the probe to, [D].
        hidden: the last hidden state of the probe in its chat format, [W].
        log_probs: of the token after it, [vocab]; -inf for those not told.
        token_ids: of the probe in its chat format.
    """

    vector: np.ndarray | None = None
    hidden: np.ndarray | None = None
    log_probs: np.ndarray | None = None
    token_ids: tuple[int, ...] = ()

    @property
    def is_empty(self) -> bool:
        return self.vector is None and self.hidden is None and self.log_probs is None


def probes(with_pictures: bool) -> list[Probe]:
    """Return what is asked; pictures of several shapes."""
    asked = [Probe(f"text {number}", text) for number, text in enumerate(TEXTS, start=1)]
    if with_pictures:
        drawn = {"gradient": _gradient(), "checkers": _checkers(), "blocks": _blocks()}
        asked += [Probe(f"picture of {name}", QUESTION, image) for name, image in drawn.items()]
    return asked


def cosine(first: Answer, second: Answer) -> float | None:
    """Return the smaller cosine of vectors and hidden states; None if one has neither."""
    pairs = [(first.vector, second.vector), (first.hidden, second.hidden)]
    found = [
        float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
        for a, b in pairs
        if a is not None and b is not None
    ]
    return min(found, default=None)


def divergence(first: Answer, second: Answer) -> float | None:
    """Return the Kullback-Leibler divergence of the second's next token from the first's, over
    the tokens that both tell; None if one tells nothing."""
    if first.log_probs is None or second.log_probs is None:
        return None
    size = min(len(first.log_probs), len(second.log_probs))  # a placeholder may have been added
    p, q = (one[:size].astype(np.float64) for one in (first.log_probs, second.log_probs))
    told = np.isfinite(p) & np.isfinite(q)
    p, q = (one[told] - np.logaddexp.reduce(one[told]) for one in (p, q))
    return max(0.0, float((np.exp(p) * (p - q)).sum()))


def _gradient() -> Image.Image:
    rows, columns = np.mgrid[0:240, 0:400]
    pixels = np.stack((rows, columns * 0.6, 255 - rows), -1)
    return Image.fromarray(pixels.astype(np.uint8))


def _checkers() -> Image.Image:
    rows, columns = np.mgrid[0:360, 0:200] // 40
    light = (rows + columns) % 2 == 0
    return Image.fromarray(np.where(light[..., None], (250, 240, 210), (120, 60, 20)).astype("u1"))


def _blocks() -> Image.Image:
    blocks = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((300, 300), Image.Resampling.NEAREST)
