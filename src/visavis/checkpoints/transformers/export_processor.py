"""Our image sizing as transformers' preprocessor_config.json: the inverse of `processor.py`.

What is written is read again by that file and must come out the same. Makes JSON; touches no
image and writes no file.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from visavis.checkpoints.transformers.export_config import inexpressible
from visavis.checkpoints.transformers.idefics3 import split_json
from visavis.checkpoints.transformers.internvl import ratio_json
from visavis.checkpoints.transformers.processor import FILTERS, GEMMA, NAFLEX, processor_config
from visavis.errors import CheckpointError
from visavis.processing.config import AnyresConfig, ImageProcessorConfig

NUMBERS = {name: number for number, name in FILTERS.items()}  # of Pillow's filters


def processor_json(config: ImageProcessorConfig) -> dict[str, Any]:
    """Return the settings of CLIP's, SigLIP's or a LLaVA's image processor.

    Raises:
        CheckpointError: none of them prepares images so.
    """
    square = {"height": config.size, "width": config.size}
    edge = math.floor(config.size / config.crop_fraction)
    cropped = {"size": {"shortest_edge": edge}, "crop_size": square, "do_center_crop": True}
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
    if config.gemma is not None:
        whole = {"do_normalize": False, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
        return found | {
            "image_processor_type": GEMMA,
            "patch_size": config.size // config.gemma.merge,
            "pooling_kernel_size": config.gemma.merge,
            "max_soft_tokens": config.gemma.max_tokens,
            **whole,
        }
    if config.naflex is not None:
        patches = {"patch_size": config.size, "max_num_patches": config.naflex.max_patches}
        return found | {"image_processor_type": NAFLEX, **patches}
    if config.tiles is not None:
        found["image_grid_pinpoints"] = pinpoints(config.tiles)
        found["do_pad"] = True
    if config.split is not None:
        return found | split_json(config)
    if config.ratio is not None:
        return found | ratio_json(config)
    if config.tiles is not None and config.tiles.multi_image == "pad":
        found |= {"image_processor_type": "LlavaOnevisionImageProcessor", "size": square}
    elif config.tiles is not None:
        found |= {"image_processor_type": "LlavaNextImageProcessor", **cropped}
    elif config.resize == "squash":
        found |= {"image_processor_type": "SiglipImageProcessor", "size": square}
    elif config.resize == "pad":
        found |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True, **cropped}
    else:
        found |= {"image_processor_type": "CLIPImageProcessor", **cropped}
    try:
        read = processor_config(found)
    except CheckpointError as error:
        raise inexpressible("the sizing of pictures", str(error)) from error
    if _compared(read) != _compared(replace(config, crop_fraction=read.crop_fraction)):
        raise inexpressible(f"the sizing of pictures ({config})", "no image processor does it")
    return found


def pinpoints(tiles: AnyresConfig) -> list[list[int]]:
    """Return the canvases as the library reads them: (height, width), ties to the same."""
    flip = -1 if tiles.axes == "wh" else 1
    return [list(grid[::flip]) for grid in tiles.grids]


def _compared(config: ImageProcessorConfig) -> ImageProcessorConfig:
    """Return a config in one of its spellings, without what other files say."""
    tiles = config.tiles
    if tiles is not None:
        grids = tuple((pair[0], pair[1]) for pair in pinpoints(tiles))
        tiles = replace(tiles, grids=grids, axes="hw")
    return replace(config, tiles=tiles, video=None)
