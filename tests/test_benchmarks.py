"""The benchmarks run, agree with their peers and report what they found; their numbers are not
judged here. `--quick` runs of the real scripts on the real weights, beside real peers.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from visavis.checkpoints.load import NANO_FOLDER

FOLDER = Path(__file__).parents[1] / "benchmarks"
ENGINES = {
    "decode": {"visavis", "llama.cpp", "transformers"},
    "prefill": {"visavis", "llama.cpp", "transformers"},
    "embed": {"visavis", "transformers", "sentence-transformers"},
    "train": {"visavis", "transformers"},
    "gradcache": {"visavis", "sentence-transformers"},
    "load": {"visavis", "llama.cpp", "transformers"},
    "picture": {"visavis", "visavis, first question"},
    "serve": {"visavis", "bare engine", "without the flood", "llama.cpp"},
}


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", ["decode.py"])
    return importlib.import_module("_harness")


def report(harness: ModuleType, path: Path) -> Any:
    options = harness.Options(
        name="decode", threads=1, runs=3, quick=False, json=path, model="nano"
    )
    return harness.Report(options, "Decode")


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("name", ENGINES)
def test_quick_run_agrees_with_its_peers(
    name: str, nano_files: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("transformers", reason="needs transformers (visavis[bench])")
    pytest.importorskip("xllamacpp", reason="needs the xllamacpp wheel (visavis[bench])")
    if not NANO_FOLDER.is_dir() and name in ("decode", "embed", "load"):
        pytest.skip("needs nano's own weights, which are not in this checkout")
    path = tmp_path / "report.json"
    command = [sys.executable, FOLDER / f"{name}.py", "--quick", "--threads", "1", "--json", path]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=900)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = json.loads(path.read_text(encoding="utf-8"))
    assert {row["engine"] for row in result["rows"]} == ENGINES[name]
    assert all(row["median"] > 0 for row in result["rows"])
    assert result["parity"] and all(check["passed"] for check in result["parity"])
    assert "Not a measurement" in ended.stdout


def test_without_a_gpu_one_line_and_exit_status_2(tmp_path: Path) -> None:
    command = [sys.executable, FOLDER / "cuda.py", "--json", tmp_path / "report.json"]
    without = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, capture_output=True, text=True, env=without, timeout=120)
    assert ended.returncode == 2 and not list(tmp_path.iterdir())
    assert len(ended.stdout.splitlines()) == 1 and "nothing was measured" in ended.stdout


@pytest.mark.parity
def test_gpu_engines_compute_the_same_here(harness: ModuleType, tmp_path: Path) -> None:
    """All that cuda.py does, on the CPU and a tiny model."""
    pytest.importorskip("transformers", reason="needs transformers (visavis[bench])")
    engines, cuda = (importlib.import_module(name) for name in ("_gpu_engines", "cuda"))
    made = {"visavis": engines.Visavis(), "transformers": engines.Transformers()}
    ask = {name: partial(call, engine) for name, engine in made.items()}
    options = harness.Options("cuda", threads=1, runs=1, quick=True, json=None, model="2B")
    with torch.inference_mode():
        found = cuda.measure(options, "tiny", "cpu", str(tmp_path), ask)
    torch.set_grad_enabled(True)
    assert found.finish() == 0 and len(found.parity) == 3
    assert [row["unit"] for row in found.rows[::2]] == [
        "tokens/s",
        "%",
        "s",
        *["tokens/s", "%"] * 2,
    ]
    assert all(row["median"] > 0 for row in found.rows)


def call(engine: Any, do: str, **arguments: Any) -> Any:
    return json.loads(json.dumps(getattr(engine, do)(**arguments)))


def test_report_compares_medians_in_the_direction_of_the_unit(
    harness: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = report(harness, tmp_path / "report.json")
    speeds = {"visavis": [50.0, 90.0, 60.0], "peer": [30.0, 30.0, 10.0]}
    found.add("speed", speeds, "tokens/s", ratios={"peer": 3})
    found.add("time", {"visavis": [2.0], "peer": [1.0]}, "s", limit=1.5)
    found.check("same", 0.0, passed=True)
    assert found.finish() == 0
    rows = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["rows"]
    assert rows[0]["median"] == statistics.median(speeds["visavis"])
    assert rows[1]["ratio"] == 2.0 and not rows[1]["met"]
    assert rows[2]["limit"] == 1.5 and not rows[2]["met"]
    assert rows[3]["ratio"] == 0.5 and rows[3]["met"]
    printed = capsys.readouterr().out
    assert "| 2.00× | ≥ 3×, missed |" in printed and "< 1.5 s, missed" in printed


def test_failed_check_is_exit_status_1_and_named(
    harness: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = report(harness, tmp_path / "report.json")
    found.add("speed", {"visavis": [1.0]}, "tokens/s")
    found.check("smallest cosine", 0.5, passed=False)
    assert found.finish() == 1
    assert "smallest cosine: 0.5 **failed**" in capsys.readouterr().out


def test_runs_are_interleaved_and_numbered(harness: ModuleType) -> None:
    order: list[tuple[str, int]] = []

    def once(name: str, run: int) -> float:
        order.append((name, run))
        return float(run)

    engines = {name: lambda run, n=name: once(n, run) for name in "AB"}
    assert harness.interleaved(engines, 2) == {"A": [0.0, 1.0], "B": [0.0, 1.0]}
    assert order == [("A", 0), ("B", 0), ("A", 1), ("B", 1)]


def test_an_engine_that_fails_ends_the_run_with_its_traceback(harness: ModuleType) -> None:
    options = harness.Options(name="load", threads=1, runs=1, quick=True, json=None, model="nano")
    with (
        harness.engines("_loaders.py", ["visavis"], options) as (engine,),
        pytest.raises(SystemExit, match=r"(?s)visavis failed at 'load'.*UnknownNameError"),
    ):
        engine.ask("load", model="no-such-model", ids=[1])
    assert engine.process.returncode == 0


def test_pages_are_those_of_the_reports() -> None:
    """Every number in docs/performance.md and the README's table is that of a committed report."""
    command = [sys.executable, FOLDER / "table.py", "--check"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, f"{ended.stdout}{ended.stderr}; run: python benchmarks/table.py"


def test_tables_are_written_between_the_marks(
    harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = report(harness, tmp_path / "report.json")
    speeds = {"visavis": [123.4], "llama.cpp": [61.7]}
    found.add("SmolLM2-135M Q4_1 GGUF, 8 tokens", speeds, "tokens/s")
    found.finish()
    table = importlib.import_module("table")
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    for name in ("PAGE", "README"):
        monkeypatch.setattr(table, name, tmp_path / name)
        (tmp_path / name).write_text(f"above\n{table.BEGIN}\nold\n{table.END}\nbelow\n")
    for arguments, status in ((["--check"], 1), ([], 0), (["--check"], 0)):
        monkeypatch.setattr(sys, "argv", ["table.py", *arguments])
        assert table.main() == status
    page, readme = ((tmp_path / name).read_text(encoding="utf-8") for name in ("PAGE", "README"))
    for text in (page, readme):
        assert text.startswith("above\n") and text.endswith("\nbelow\n") and "old" not in text
    assert "| llama.cpp | 61.7 tokens/s | 61.7 – 61.7 | 2.00× |" in page
    assert "| decode, 135M, 4-bit GGUF | 123 tokens/s | 2.00× |  |" in readme
    (tmp_path / "report.json").write_text(
        (tmp_path / "report.json").read_text().replace("123.4", "99")
    )
    monkeypatch.setattr(sys, "argv", ["table.py", "--check"])
    assert table.main() == 1


def test_cpu_time_of_other_processes_is_reported(harness: ModuleType) -> None:
    clock = harness.CpuClock
    cores = harness.psutil.cpu_count()
    before, after = clock(0.0, 100.0, 10.0), clock(10.0, 100.0 + 8 * cores, 10.0 + 3 * cores)
    assert after.share_of_others(before) == pytest.approx(0.5)  # 5 of 10 seconds of each core
    own = clock(10.0, 103.0, 13.0)
    assert own.share_of_others(before) == 0.0

    started = clock.now()
    code = "import time\nend = time.process_time() + 1\nwhile time.process_time() < end: pass"
    subprocess.run([sys.executable, "-c", code], check=True)  # a child is ours, not another's
    ended = clock.now()
    assert ended.own - started.own >= 0.9 and ended.machine - started.machine >= 0.9
