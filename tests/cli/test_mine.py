"""`visavis mine` on a real, tiny model: the lines it writes, what stops it, and going on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run
from tests.fakes import write_pictures
from visavis.api import Model
from visavis.data import hard_negatives
from visavis.data.sources import SourceConfig


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Twelve texts that look for pictures."""
    paths = write_pictures(tmp_path / "pictures", 12)
    rows = [
        {"id": i, "query": f"number {i}", "positives": [{"image": f"pictures/{path.name}"}]}
        for i, path in enumerate(paths)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_lines_and_summary(run: Run, tiny: str, pairs: Path, tmp_path: Path) -> None:
    words = ("mine", tiny, pairs, "-o", "out/negatives.jsonl", "--nearest", 2, "--total", 3)
    shown = run(*words, "--relative-margin", "none")
    assert shown.exit_code == 0, shown.output
    assert shown.stdout == (
        "out/negatives.jsonl: negatives for 12 samples among 12 items: 24 nearest, 12 random; "
        "24 embeddings computed, 0 from the cache\n"
    )
    rows = lines(tmp_path / "out/negatives.jsonl")
    assert [row["id"] for row in rows] == [str(i) for i in range(12)]
    for number, row in enumerate(rows):
        assert [one["source"] for one in row["negatives"]] == ["nearest", "nearest", "random"]
        scores = [one["score"] for one in row["negatives"]]
        assert scores[0] >= scores[1] >= scores[2]
        found = [Path(tmp_path / "out" / one["image"]) for one in row["negatives"]]
        assert all(path.is_file() for path in found) and len(set(found)) == 3
        assert f"picture-{number:03d}.png" not in {path.name for path in found}
    whole = json.loads(run(*words, "--relative-margin", "none", "--seed", 1, "--json").stdout)
    assert (whole["embedded"], whole["reused"], whole["short"]) == (0, 24, 0)
    assert whole["sources"] == {"nearest": 24, "random": 12} and whole["left_out"] == []
    assert whole["settings"]["relative_margin"] is None and whole["settings"]["nearest"] == 2
    again = lines(tmp_path / "out/negatives.jsonl")
    assert [r["negatives"][:2] for r in again] == [r["negatives"][:2] for r in rows]
    assert again != rows  # other random ones


def test_ctrl_c_keeps_vectors_and_writes_nothing(
    run: Run, tiny: str, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hard_negatives, "BATCH", 5)
    calls, embed = [], Model.embed

    def stopped(self: Model, *words: Any, **more: Any) -> Any:
        calls.append(words)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return embed(self, *words, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Model, "embed", stopped)
        assert run("mine", tiny, pairs, "-o", "negatives.jsonl").exit_code == 130
    assert not (tmp_path / "negatives.jsonl").exists()
    whole = json.loads(run("mine", tiny, pairs, "-o", "negatives.jsonl", "--json").stdout)
    assert (whole["reused"], whole["embedded"]) == (10, 14)


def test_killed_it_goes_on_to_the_same_lines(tiny: str, pairs: Path, tmp_path: Path) -> None:
    code = """
import os, signal, sys
from visavis.api import Model
from visavis.cli import app
from visavis.data import hard_negatives
hard_negatives.BATCH, embed, calls = 5, Model.embed, []
def killed(self, *words, **more):
    calls.append(words)
    if len(calls) == int(os.environ["KILLED_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return embed(self, *words, **more)
Model.embed = killed
app(prog_name="visavis")
"""

    def start(name: str, limit: int) -> subprocess.CompletedProcess[str]:
        out, cache = str(tmp_path / f"{name}.jsonl"), str(tmp_path / f"{name}-vectors")
        words = [
            "mine",
            tiny,
            str(pairs),
            "-o",
            out,
            "--cache",
            cache,
            "--sampling-strategy",
            "random",
            "--total",
            "12",
        ]
        command = [sys.executable, "-c", code, *words]
        environment = {**os.environ, "KILLED_AT": str(limit)}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    assert start("killed", 4).returncode == -signal.SIGKILL
    assert not (tmp_path / "killed.jsonl").exists()
    done = start("killed", 99)
    assert done.returncode == 0 and "9 embeddings computed, 15 from the cache" in done.stdout, (
        done.stderr
    )
    assert start("whole", 99).returncode == 0
    assert lines(tmp_path / "killed.jsonl") == lines(tmp_path / "whole.jsonl")


def test_a_source_of_a_recipe(run: Run, tiny: str, pairs: Path, tmp_path: Path) -> None:
    recipe = f"""
name: one
model: {{base: {tiny}}}
data:
  finds: {{format: pairs, path: pairs.jsonl, cap: 5, negatives: absent.jsonl}}
  other: {{format: shapes, path: train, options: {{as: find}}, cap: 4}}
stages:
  - kind: steps
    name: match
    steps: 1
    contrastive: {{sources: {{finds: {{}}, other: {{}}}}, batch: 2}}
    train: {{connector: 1.0e-3}}
"""
    (tmp_path / "one.yaml").write_text(recipe)
    words = ("mine", tiny, "one.yaml", "--data", tmp_path, "-o", "n.jsonl")
    refused = run(*words)
    assert refused.exit_code == 2
    assert "has 2 sources for contrast (finds, other); name one with --source" in refused.stderr
    assert "did you mean 'finds'" in run(*words, "--source", "find").stderr
    assert run(*words, "--source", "finds").exit_code == 0
    assert len(lines(tmp_path / "n.jsonl")) == 5
    assert run(*words, "--source", "other").exit_code == 0  # pictures of no files
    row = lines(tmp_path / "n.jsonl")[0]
    assert row["negatives"][0]["image"].startswith("n-files/")
    assert SourceConfig(format="shapes", path="train", negatives="n.jsonl")


def test_scene_graphs_and_their_label_files(run: Run, tiny: str, tmp_path: Path) -> None:
    words = ("--nearest", 0, "--labels", 2, "--same-image", 1, "--total", 4)
    (tmp_path / "pictures").mkdir()
    (picture,) = write_pictures(tmp_path / "pictures", 1)
    rows = [
        {
            "id": i,
            "image_id": 1,
            "image": picture.name,
            "predicate": predicate,
            "subject": {"class_name": "cup", "bbox": [i, 0, 10 + i, 10]},
            "object": {"class_name": "table", "bbox": [0, 5, 40, 30]},
        }
        for i, predicate in enumerate(("on", "near", "above", "under", "behind", "in"))
    ]
    (tmp_path / "graph.json").write_text(json.dumps(rows))
    shown = run("mine", tiny, "graph.json", "--images", "pictures", "-o", "n.jsonl", *words,
                "--label-files", "labels")  # fmt: skip
    assert shown.exit_code == 0, shown.output
    assert "12 labels, 6 same image, 6 random; 6 embeddings computed" in shown.stdout
    assert sorted(path.name for path in (tmp_path / "labels").iterdir()) == [
        "predicate_neighbors.json",
        "predicate_vocab.json",
        "same_image_negatives.json",
    ]
    first = lines(tmp_path / "n.jsonl")[0]["negatives"]
    assert "The subject is on the object." not in {one["text"] for one in first}
    (tmp_path / "vocab.txt").write_text("on, near, above")
    refused = run("mine", tiny, "graph.json", "--images", "pictures", "-o", "n.jsonl", *words,
                  "--label-files", "labels", "--vocabulary", "vocab.txt")  # fmt: skip
    assert refused.exit_code == 2 and "3 of the 6 predicates" in refused.stderr


def test_bad_input_is_one_line(run: Run, tiny: str, pairs: Path, tmp_path: Path) -> None:
    for words, expected in (
        ((tiny, "nowhere.jsonl", "-o", "n.jsonl"), "nowhere.jsonl is no file"),
        ((tiny, pairs, "-o", "n.jsonl", "--format", "pair"), "did you mean 'pairs'"),
        ((tiny, pairs, "-o", "n.jsonl", "--nearest", 0), "no negatives are wanted"),
        ((tiny, pairs, "-o", "n.jsonl", "--corpus", "no.jsonl"), "cannot read no.jsonl"),
        ((tiny, pairs, "-o", "n.jsonl", "--label-files", "x"), "needs data of format"),
        ((tiny, pairs, "-o", "pictures"), "pictures is a folder"),
    ):
        result = run("mine", *words)
        assert result.exit_code == 2, result.output
        assert expected in result.stderr and result.stderr.count("\n") == 1
    (tmp_path / "pictures/picture-003.png").write_bytes(b"no picture")
    result = run("mine", tiny, pairs, "-o", "n.jsonl", "--relative-margin", "none")
    assert result.exit_code == 0 and len(lines(tmp_path / "n.jsonl")) == 11
    assert "skipped: the target of 3: " in result.stderr
