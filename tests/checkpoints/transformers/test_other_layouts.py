"""Models of tiles that only their own layout and ours can hold are refused by the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints.idefics3_files import save_idefics3
from tests.checkpoints.internvl_files import save_internvl
from tests.checkpoints.onevision15_files import save_onevision15
from visavis.checkpoints.formats import TARGETS
from visavis.checkpoints.load import load_checkpoint
from visavis.errors import CheckpointError

SAVES: dict[str, Callable[[Path], Any]] = {
    "idefics3": save_idefics3,
    "internvl": save_internvl,
    "onevision15": save_onevision15,
}


@pytest.mark.parametrize("name", SAVES)
@pytest.mark.parametrize("target", ["llava", "tinyllava", "gguf"])
def test_they_refuse(name: str, target: str, tmp_path: Path) -> None:
    SAVES[name](tmp_path / "in")
    loaded = load_checkpoint(tmp_path / "in", precision="f32", device="cpu")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(CheckpointError, match="expected|cannot|can be written here"):
        TARGETS[target].save(loaded, out, kind="F32")
    assert list(out.iterdir()) == []
