"""Folders that sentence-transformers opens: our own layout, and two files that say who reads it.

modules.json                        one module: `visavis.interop.sentence_transformers`
config_sentence_transformers.json   cosine similarity, no prompts
visavis.json, model.safetensors …   see `native.py`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from visavis.checkpoints.loaded import Loaded
from visavis.checkpoints.native import write_native
from visavis.checkpoints.writing import Written, write_json

MODULE = "visavis.interop.sentence_transformers.VisavisModule"


def write_sentence_transformers(loaded: Loaded, folder: Path, *, progress: bool = False) -> Written:
    """Write a loaded model; it stays a folder that `visavis.load` reads."""
    written = write_native(loaded, folder, progress=progress)
    settings: dict[str, Any] = {
        "model_type": "SentenceTransformer",
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    files = [
        write_json(folder / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": MODULE}]),
        write_json(folder / "config_sentence_transformers.json", settings),
    ]
    return Written([*files, *written.files], written.lost)
