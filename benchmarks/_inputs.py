"""What benchmarks feed to models: made-up texts, and real pictures in made-up sizes.

Everything follows from a number, so each run gets inputs of its own and all engines the same ones.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

_WORDS = (
    "river mountain garden window letter market winter summer captain teacher village forest "
    "island morning evening bridge castle engine mirror paper silver golden music story dinner "
    "doctor farmer kitchen library museum ocean painter planet prince queen school shadow sister "
    "station street thunder tower train valley voice water weather wisdom writer yellow"
)
WORDS = _WORDS.split()


def text(chance: random.Random, num_words: int) -> str:
    """Return words in a row, with a full stop now and then."""
    words = [chance.choice(WORDS) + chance.choice(("", "", "", "", ",", ".")) for _ in range(10**3)]
    return " ".join(words[:num_words]).capitalize()


def pictures(originals: list[Path], folder: Path, count: int, number: int) -> list[Path]:
    """Write JPEG files: parts of the originals, longest sides from 320 to 1280 pixels."""
    from PIL import Image

    chance = random.Random(f"pictures {number}")
    paths = []
    for index in range(count):
        with Image.open(originals[index % len(originals)]) as opened:
            original = opened.convert("RGB")
        share = chance.uniform(0.6, 1.0)
        width, height = (int(side * share) for side in original.size)
        left = chance.randint(0, original.width - width)
        top = chance.randint(0, original.height - height)
        scale = chance.randint(320, 1280) / max(width, height)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        part = original.resize(size, box=(left, top, left + width, top + height))
        paths.append(folder / f"{number}-{index}.jpg")
        part.save(paths[-1], quality=90)
    return paths


def mixed(
    counts: dict[str, int], originals: list[Path], folder: Path, number: int, words: float = 1.0
) -> list[dict[str, Any]]:
    """Return items as `{"text": …}`, `{"image": …}` or both, in random order.

    Args:
        counts: how many of each kind: "short text", "long text", "image", "image and text".
        words: share of a text's usual words; a fifth, for a model that reads bytes, is as many
            tokens.
    """
    chance = random.Random(f"items {number}")
    files = iter(pictures(originals, folder, sum(counts.values()), number))
    items: list[dict[str, Any]] = []
    for kind, count in counts.items():
        for _ in range(count):
            item: dict[str, Any] = {}
            if kind.startswith("image"):
                item["image"] = str(next(files))
            if kind.endswith("text"):
                long = kind == "long text"
                usual = chance.randint(*((150, 350) if long else (4, 16)))
                item["text"] = text(chance, max(1, round(words * usual)))
            items.append(item)
    chance.shuffle(items)
    return items
