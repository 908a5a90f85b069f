"""Text in images by RapidOCR (`pip install 'visavis[ocr]'`), whose wheel holds PP-OCRv6's weights.

Reads Chinese, English and other languages in Latin script. Nothing is downloaded.
"""

from __future__ import annotations

import os
import threading
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as pil

from visavis.errors import InputError

MAX_SIDE = 1600  # pixels, longer side of what is read, as PDF pages are rendered
LEAST_SIDE = 8  # pixels, shorter side
_WEIGHTS = ("PP-OCRv6_det_small.onnx", "PP-OCRv6_rec_small.onnx")
_lock = threading.Lock()  # one image at a time: the library uses all cores itself


def check_ocr() -> None:
    """Check that text recognition can run.

    Raises:
        InputError: its packages are not installed, or their weights are missing.
    """
    missing = [name for name in ("rapidocr", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise InputError(
            f"reading text in images needs {' and '.join(missing)}, not installed: "
            "pip install 'visavis[ocr]'"
        )
    spec = find_spec("rapidocr")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "models"
    absent = [name for name in _WEIGHTS if not (folder / name).is_file()]
    if absent:
        raise InputError(
            f"rapidocr's weights {' and '.join(absent)} are not in {folder}, where its wheel has "
            "them: another version is the likely cause; pip install 'rapidocr>=3.10'"
        )


def read_text(image: pil.Image) -> str:
    """Return the lines of text in an RGB image, from top to bottom; empty without any.

    Raises:
        InputError: as `check_ocr`.
    """
    check_ocr()
    if min(image.size) < LEAST_SIDE:
        return ""
    if max(image.size) > MAX_SIDE:
        image = image.copy()
        image.thumbnail((MAX_SIDE, MAX_SIDE))
    pixels = np.ascontiguousarray(np.asarray(image)[:, :, ::-1])  # BGR, as OpenCV
    with _lock:
        found = _engine()(pixels)
    return "\n".join(found.txts or ())


@cache
def _engine() -> Any:
    from rapidocr import RapidOCR

    threads = int(os.environ.get("OMP_NUM_THREADS") or -1)
    settings: dict[str, Any] = {
        "Global.log_level": "error",
        "Det.limit_type": "max",  # its default enlarges small images many times
        "Det.limit_side_len": MAX_SIDE,
        "EngineConfig.onnxruntime.intra_op_num_threads": threads,
    }
    return RapidOCR(params=settings)
