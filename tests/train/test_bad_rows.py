"""Rows that cannot be used: they stop a run, or are left out and listed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fakes import write_pictures, write_tiny_checkpoint
from visavis.errors import TrainError
from visavis.train.recipe import Recipe
from visavis.train.runner import run_recipe


def recipe(base: Path, bad_rows: str) -> Recipe:
    stage = {
        "kind": "steps",
        "name": "chat",
        "epochs": 1,
        "generative": {"sources": {"talk": {}}, "batch": 2},
        "train": {"connector": 1e-3},
    }
    return Recipe.model_validate(
        {
            "name": "small",
            "model": {"base": str(base)},
            "data": {"talk": {"format": "llava", "path": "talk.jsonl"}},
            "stages": [stage],
            "precision": "f32",
            "trackers": [],
            "bad_rows": bad_rows,
        }
    )


def write_rows(folder: Path) -> None:
    """Six good rows and three bad ones: no file, no image, no question."""
    names = [path.name for path in write_pictures(folder, 6)]
    (folder / "broken.png").write_bytes(b"no image")
    asked = [("human", "<image>\nwhat?"), ("gpt", "it is")]
    rows = [(name, asked) for name in names]
    rows[1:1] = [("absent.png", asked), ("broken.png", asked)]
    rows.append((names[0], asked[1:]))
    lines = [
        json.dumps(
            {
                "id": f"row-{number}",
                "image": name,
                "conversations": [{"from": who, "value": text} for who, text in turns],
            }
        )
        for number, (name, turns) in enumerate(rows)
    ]
    (folder / "talk.jsonl").write_text("\n".join(lines))


def test_bad_rows_stop_a_run_unless_they_are_skipped(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_tiny_checkpoint(base)
    write_rows(tmp_path)
    with pytest.raises(TrainError, match="row-"):
        run_recipe(recipe(base, "stop"), tmp_path, tmp_path / "stopped")
    out = tmp_path / "out"
    with pytest.warns(UserWarning, match="3 rows of 'talk' are skipped"):
        run_recipe(recipe(base, "skip"), tmp_path, out)
    (skipped,) = json.loads((out / "skipped_rows.json").read_text()).values()
    reasons = {row["id"]: row["reason"] for row in skipped}
    assert sorted(reasons) == ["row-1", "row-2", "row-8"]
    assert "does not exist" in reasons["row-1"] and "not a picture" in reasons["row-2"]
    assert "1 files for them" in reasons["row-8"]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().split("\n") if line]
    assert max(line.get("step", 0) for line in log) == 3, "an epoch of six rows, two a step"


def test_a_run_is_not_resumed_with_other_bad_rows(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_tiny_checkpoint(base)
    write_rows(tmp_path)
    out = tmp_path / "out"
    with pytest.warns(UserWarning, match="are skipped"):
        run_recipe(recipe(base, "skip"), tmp_path, out)
    (tmp_path / "picture-003.png").unlink()
    with pytest.raises(TrainError, match="other rows of 'talk' cannot be used than when the run"):
        run_recipe(recipe(base, "skip"), tmp_path, out)


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_tiny_checkpoint(base)
    write_rows(tmp_path)
    for path in tmp_path.glob("*.png"):
        path.unlink()
    with pytest.raises(TrainError, match="none of 9 records can be used"):
        run_recipe(recipe(base, "skip"), tmp_path, tmp_path / "out")
