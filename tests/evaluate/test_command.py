"""`visavis evaluate` as a program: suites, checks, JSON, reports, comparisons, processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.evaluate import official_files as files
from tests.fakes import write_tiny_checkpoint
from visavis.cli import app
from visavis.evaluate.suite import suite_names


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files.write_mmeb_eval(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    return [str(write_tiny_checkpoint(root / f"m{i}", name=f"m{i}", seed=i)) for i in range(2)]


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, words)])


def test_suites_are_listed() -> None:
    found = run("suites")
    assert found.exit_code == 0 and all(name in found.output for name in suite_names())


def test_a_run_prints_json_and_writes_its_files(
    data: Path, models: list[str], tmp_path: Path
) -> None:
    words = ("--suite", "mmeb-v1", "--data", data, "--tasks", "VOC2007,CIRR", "--json")
    found = run(models[0], *words, "--output", tmp_path / "a", "--precision", "f32")
    assert found.exit_code == 0, found.output
    document = json.loads(found.output)
    assert document["suite"] == "mmeb-v1" and list(document["tasks"]) == ["VOC2007", "CIRR"]
    assert document["model"]["name"] == "m0" and document["incomplete"] == []
    assert document == json.loads((tmp_path / "a/results.json").read_text())
    sample = json.loads((tmp_path / "a/tasks/CIRR.json").read_text())["samples"][0]
    assert len(sample["top"]) == 5 and sample["ranks"] and sample["query"]["images"]

    second = run(models[1], *words, "--output", tmp_path / "b", "--precision", "f32")
    assert second.exit_code == 0
    compared = run("compare", tmp_path / "a", tmp_path / "b", "--json")
    difference = json.loads(compared.output)["VOC2007"]
    scores = [json.loads((tmp_path / n / "results.json").read_text()) for n in "ab"]
    values = [one["tasks"]["VOC2007"]["hit@1"] for one in scores]
    assert difference["difference"] == pytest.approx(values[1] - values[0])

    page = tmp_path / "report.html"
    assert run("report", tmp_path / "a", tmp_path / "b", "--output", page).exit_code == 0
    text = page.read_text()
    assert "Difference" in text and "VLM2Vec-V2-2B" in text and "data:image/jpeg;base64" in text
    assert run("report", tmp_path / "a", "-o", page, "--no-images").exit_code == 0
    assert "data:image" not in page.read_text()


def test_an_incomplete_run_exits_1_and_says_why(
    data: Path, models: list[str], tmp_path: Path
) -> None:
    found = run(models[0], "-s", "mmeb-v1", "--data", tmp_path, "--tasks", "VOC2007")
    assert found.exit_code == 1 and "incomplete: VOC2007" in found.output
    table = run(
        models[0], "-s", "mmeb-v1", "--data", data, "--tasks", "VOC2007", "--max-records", "2"
    )
    assert table.exit_code == 1 and "left out by max_records=2" in table.output


def test_a_check_needs_no_model(data: Path) -> None:
    found = run("--suite", "mmeb-v1", "--data", data, "--check")
    assert found.exit_code == 0 and found.output.count("ready") == 36
    missing = run("--suite", "vqa", "--data", data, "--check", "--json")
    document = json.loads(missing.output)
    assert missing.exit_code == 1 and {t["status"] for t in document["tasks"]} == {"missing"}
    assert document["commands"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nano", "--data", "."), "--suite is missing"),
        (("nano", "--suite", "mmeb-v1"), "--data is missing"),
        (("--suite", "mmeb-v1", "--data", "."), "MODEL is missing"),
        (("nano", "--suite", "mmeb-v4", "--data", "."), "did you mean"),
        (("nano", "--suite", "mmeb-v1", "--data", ".", "--tasks", "VOC"), "VOC2007"),
        (
            ("nano", "--suite", "mmeb-v1", "--data", ".", "--ties", "kind"),
            "pessimistic or official",
        ),
        (("report", "nowhere"), "cannot read"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(words: tuple[str, ...], said: str) -> None:
    found = run(*words)
    assert found.exit_code == 2 and said in found.output and "Traceback" not in found.output


def visavis(*words: str | Path, world: int = 1) -> list[subprocess.Popen[str]]:
    """Start the program, in as many processes as a launcher would."""
    command = [sys.executable, "-m", "visavis", "evaluate", *map(str, words)]
    port = str(20000 + os.getpid() % 20000)
    settings = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            command,
            env=os.environ
            | (settings | {"RANK": str(r), "LOCAL_RANK": str(r)} if world > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(world)
    ]


@pytest.mark.slow
def test_two_processes_give_what_one_gives(data: Path, models: list[str], tmp_path: Path) -> None:
    words = (models[0], "-s", "mmeb-v1", "--data", data, "--tasks", "CIRR,VOC2007,EDIS", "--json")
    words = (*words, "--precision", "f32", "--device", "cpu")  # type: ignore[assignment]
    (one,) = visavis(*words, "-o", tmp_path / "one")
    alone = json.loads(one.communicate(timeout=300)[0])
    together = visavis(*words, "-o", tmp_path / "two", world=2)
    outputs = [process.communicate(timeout=300) for process in together]
    assert [process.returncode for process in together] == [0, 0], outputs
    found = json.loads(outputs[0][0])
    for name, task in alone["tasks"].items():
        same = {k: v for k, v in task.items() if k != "info"}
        assert {k: v for k, v in found["tasks"][name].items() if k != "info"} == same
    assert outputs[1][0] == ""  # one of them prints


@pytest.mark.slow
def test_a_killed_run_resumes(data: Path, models: list[str], tmp_path: Path) -> None:
    words = (models[0], "-s", "mmeb-v1", "--data", data, "-o", tmp_path / "run", "--json")
    (killed,) = visavis(*words)
    vectors = tmp_path / "run/vectors"
    deadline = time.monotonic() + 120
    while len(list(vectors.glob("*/*.npy"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    kept = len(list(vectors.glob("*/*.npy")))
    assert kept >= 5
    (again,) = visavis(*words)
    found = json.loads(again.communicate(timeout=300)[0])
    assert found["incomplete"] == []
    embedded = sum(task["info"]["embedded"] for task in found["tasks"].values())
    assert 0 < embedded < 72 * 5  # each side of 36 tasks has about 5 items
