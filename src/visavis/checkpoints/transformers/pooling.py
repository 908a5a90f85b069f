"""Folders of embedders that sentence-transformers saved: `modules.json` and the pooling it names.

modules.json             the modules in order: Transformer, Pooling, maybe Normalize
1_Pooling/config.json    which token's hidden state is the vector, or the mean of all
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visavis.checkpoints.tensor_files import MAX_JSON_BYTES, read_json
from visavis.checkpoints.transformers.config_reader import section
from visavis.errors import CheckpointError
from visavis.utils import parse_json

MODULES, SETTINGS = "modules.json", "sentence_bert_config.json"
POOLING: dict[str, Any] = {"lasttoken": "last", "cls": "first", "mean": "mean"}
LEGACY = {
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
}
FOLDER = re.compile(r"[\w-]*")


def read_pooling(folder: Path, template: str) -> Any:
    """Return the `PromptConfig.pooling` of a folder; empty where sentence-transformers wrote none.

    Args:
        template: the chat template beside it; empty: there is none.

    Raises:
        CheckpointError: modules.json is damaged, or names a module that is not read.
    """
    path, settings = folder / MODULES, folder / SETTINGS
    if not path.is_file():
        return ""
    asks = section(read_json(settings), "modality_config") if settings.is_file() else {}
    if template and "message" in asks:
        raise CheckpointError(
            f"{settings} says that sentence-transformers puts every text into the chat template "
            "of this embedder, which is not read here; expected one that reads plain texts."
        )
    pooling = ""
    for module in _modules(path):
        kind, place = str(module.get("type")).rpartition(".")[2], str(module.get("path"))
        if not FOLDER.fullmatch(place) or kind not in ("Transformer", "Pooling", "Normalize"):
            raise CheckpointError(
                f"{path} names a module {kind!r} in {place!r}, expected Transformer, Pooling and "
                "Normalize: the vectors of this embedder pass a part that is not read here."
            )
        if kind == "Pooling":
            config = read_json(folder / place / "config.json")
            modes = [name for key, name in LEGACY.items() if config.get(key) is True]
            others = [key for key, on in config.items() if key.startswith("pooling_mode_") and on]
            mode = config.get("pooling_mode", modes[0] if len(modes) == len(others) == 1 else None)
            if mode not in POOLING:
                raise CheckpointError(
                    f"{folder / place} pools by {mode or others}, expected one of "
                    f"{', '.join(POOLING)}."
                )
            pooling = POOLING[mode]
    return pooling


def _modules(path: Path) -> list[Mapping[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            found = parse_json(file.read(MAX_JSON_BYTES))
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise ValueError("expected a list of modules")
        return found
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; copy the folder again.") from error
