"""Pixel modes of decoded images: conversion to RGB, transparency and wide grey values."""

from __future__ import annotations

import numpy as np
from PIL import Image as pil

from visavis.errors import ImageError


def scale_transparency_key(opened: pil.Image) -> None:
    """Give the transparent colour of a PNG (tRNS) the scale of the pixels it is compared with.

    Pillow keeps the key as stored while it expands 2- and 4-bit grey to 8 bits and reduces 16-bit
    colour to its high bytes; 16-bit grey keeps all bits (see `_wide_to_grey`).
    """
    key = opened.info.get("transparency")
    tiles = getattr(opened, "tile", None)  # what load() is about to decode
    if opened.format != "PNG" or not isinstance(key, (int, tuple)) or not tiles:
        return
    raw_mode = tiles[0][3]
    raw_mode = raw_mode if isinstance(raw_mode, str) else raw_mode[0]
    if raw_mode in ("L;2", "L;4") and isinstance(key, int):
        opened.info["transparency"] = key % 4 * 85 if raw_mode == "L;2" else key % 16 * 17
    elif raw_mode == "RGB;16B" and isinstance(key, tuple):
        opened.info["transparency"] = tuple(value >> 8 for value in key)
    elif raw_mode == "RGB" and isinstance(key, tuple):
        opened.info["transparency"] = tuple(value & 255 for value in key)
    elif raw_mode == "L" and isinstance(key, int):
        opened.info["transparency"] = key & 255


def to_rgb(image: pil.Image, name: str) -> pil.Image:
    """Convert any Pillow mode to RGB; transparent pixels lie on white.

    Raises:
        ImageError: wide values are outside the ranges that `_wide_to_grey` reads.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _wide_to_grey(image, name).convert("RGB")
    if image.has_transparency_data:
        if image.mode == "La":  # Pillow converts La to LA only
            image = image.convert("LA")
        rgba = image.convert("RGBA")
        white = pil.new("RGBA", rgba.size, (255, 255, 255, 255))
        return pil.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _wide_to_grey(image: pil.Image, name: str) -> pil.Image:
    """8-bit grey from Pillow's wide modes. Which value is white:

    I;16       65535
    I          255 if nothing is brighter (Pillow's own convert("I")), else 65535
    F          1.0 if nothing is brighter, else 255 (Pillow's own convert("F"))

    Pixels of the colour that the image declares transparent (PNG tRNS) become white.
    """
    values = np.asarray(image)  # [H, W]
    low, high = float(values.min()), float(values.max())
    levels = {"I": (255, 65535), "F": (1, 255)}.get(image.mode, (65535,))
    white = next((level for level in levels if high <= level), None)
    if white is None or not low >= 0:  # `not >=` also catches NaN
        raise ImageError(
            f"{name} has values from {low:g} to {high:g}, expected 0 to "
            f"{' or 0 to '.join(map(str, levels))}; scale it to 8-bit grey first"
        )
    grey = np.rint(values * (255.0 / white)).astype(np.uint8)
    key = image.info.get("transparency")
    if isinstance(key, int):  # lies on white
        grey[values == key] = 255
    return pil.fromarray(grey)
