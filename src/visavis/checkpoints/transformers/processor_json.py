"""Our picture sizing as transformers' preprocessor_config.json: the inverse of `processor.py`.

What is written is read again by that file and must come out the same. Makes JSON; touches no
picture and writes no file.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from visavis.checkpoints.transformers.config_json import inexpressible
from visavis.checkpoints.transformers.processor import FILTERS, processor_config
from visavis.errors import CheckpointError
from visavis.processing.images import ImageProcessorConfig

NUMBERS = {name: number for number, name in FILTERS.items()}  # of Pillow's filters


def processor_json(config: ImageProcessorConfig) -> dict[str, Any]:
    """Return the settings of CLIP's, SigLIP's or LLaVA's image processor.

    Raises:
        CheckpointError: none of them prepares pictures so.
    """
    square = {"height": config.size, "width": config.size}
    edge = math.floor(config.size / config.crop_fraction)
    found: dict[str, Any] = {
        "image_mean": list(config.mean),
        "image_std": list(config.std),
        "resample": NUMBERS[config.resample],
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
    }
    if config.resize == "squash":
        found |= {"image_processor_type": "SiglipImageProcessor", "size": square}
    else:
        found |= {"size": {"shortest_edge": edge}, "crop_size": square, "do_center_crop": True}
        found["image_processor_type"] = "CLIPImageProcessor"
    if config.resize == "pad":
        found |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    try:
        read = processor_config(found)
    except CheckpointError as error:
        raise inexpressible("the sizing of pictures", str(error)) from error
    if replace(read, crop_fraction=config.crop_fraction) != config:
        raise inexpressible(f"the sizing of pictures ({config})", "no image processor does it")
    return found
