"""Pictures that tests share."""

import numpy as np
from PIL import Image as pil
from PIL import ImageDraw

RED = (255, 0, 0)


def scene(width=97, height=61, seed=0):
    """A picture with edges, text, smooth parts and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (x * y) % 256], axis=2)
    pixels = np.clip(pixels + rng.integers(-20, 20, pixels.shape), 0, 255).astype(np.uint8)
    picture = pil.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((width // 8, height // 8, width // 2, height // 2), (255, 255, 255), (0, 0, 0))
    draw.text((width // 6, height // 6), "Ag", (0, 0, 0))
    return picture
