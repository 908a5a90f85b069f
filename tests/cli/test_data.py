"""`visavis data check`: what it prints, and what its exit code says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.conftest import Run
from tests.data.data_files import write_lines, write_pictures


def chat(id: int, answer: str = "A cat.", image: str = "a.png") -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": answer}]
    return {"id": id, "image": image, "conversations": turns}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "pictures", "a.png", "b.png")
    write_lines(tmp_path / "train.jsonl", [chat(0), chat(1, "A fox.", "b.png")])
    return tmp_path


def test_sound_files_end_well(run: Run, folder: Path) -> None:
    result = run("data", "check", "train.jsonl", "--images", "pictures")
    assert result.exit_code == 0, result.output
    assert "2 samples, 2 images" in result.output and "█" in result.output
    assert "2 valid training samples" in result.output


def test_faults_are_listed_and_told_by_the_exit_code(run: Run, folder: Path) -> None:
    rows = [chat(number, image="gone.png") for number in range(7)]
    write_lines(folder / "bad.jsonl", rows)
    result = run("data", "check", "bad.jsonl", "train.jsonl", "--images", "pictures")
    assert result.exit_code == 1
    assert "7 × picture missing or unreadable" in result.output
    assert "    0: " in result.output and "gone.png' does not exist" in result.output
    assert "and 2 more (--json lists all)" in result.output
    assert "7 problems" in result.output


def test_what_is_held_out_is_compared(run: Run, folder: Path) -> None:
    write_lines(folder / "test.jsonl", [chat(9), chat(10, "else")])
    words = ("data", "check", "train.jsonl", "--test", "test.jsonl", "--images", "pictures")
    result = run(*words, "--json")
    assert result.exit_code == 1
    trained, tested = json.loads(result.output)
    assert (trained["test"], trained["problems"]) == (False, [])
    (problem,) = tested["problems"]
    assert (problem["kind"], problem["id"]) == ("leak", "9")
    assert [one["id"] for one in tested["leaked_images"]] == ["9", "10"]
    assert trained["tokens"]["estimated"] and trained["tokens"]["sequences"] == 2


def test_a_recipe_is_checked_with_its_model_and_limits(run: Run, folder: Path, tiny: str) -> None:
    write_lines(folder / "held.jsonl", [chat(5, "held out", "b.png")])
    source = {"format": "llava", "images": "pictures"}
    recipe = {
        "name": "r",
        "model": {"base": tiny},
        "data": {
            "mine": {**source, "path": "train.jsonl"},
            "held": {**source, "path": "held.jsonl"},
        },
        "stages": [
            {
                "kind": "steps",
                "name": "s",
                "steps": 1,
                "train": {"connector": 1e-3},
                "generative": {"sources": {"mine": {}}, "max_tokens": 8},
            }
        ],
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    result = run("data", "check", "r.yaml", "--data", folder, "--json")
    assert result.exit_code == 1, result.output
    mine, held = json.loads(result.output)
    assert not mine["tokens"]["estimated"]
    assert [problem["kind"] for problem in mine["problems"]] == ["long", "long"]
    assert held["test"] and held["problems"] == [] and not mine["test"]


@pytest.mark.parametrize("words", [["gone.jsonl"], ["gone.yaml"], ["*.json"]])
def test_what_cannot_be_checked_at_all_is_one_line(
    run: Run, tmp_path: Path, words: list[str]
) -> None:
    result = run("data", "check", *words)
    assert result.exit_code == 2
    assert result.output.startswith("visavis: error: ") and result.output.count("\n") == 1
