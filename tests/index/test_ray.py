"""A corpus embedded on a local Ray cluster, with workers killed in mid-run: every item once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.fakes import write_pictures, write_tiny_checkpoint
from visavis.errors import InputError
from visavis.index.ray_engine import EmbedJob, run_on_ray

pytest.importorskip("ray.data", reason="needs the extra `ray`")
psutil = pytest.importorskip("psutil")
parquet = pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
LIMIT = 1800  # seconds; Ray alone starts for minutes on a loaded machine


def start(checkpoint, corpus, output, *options):
    arguments = ["embed", checkpoint, "--corpus", corpus, "--output", output, "--engine", "ray"]
    arguments += ["--workers", 2, "--shard-size", 10, "--precision", "f32", "--json", *options]
    paths = [str(REPOSITORY / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", "visavis", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "RAY_raylet_start_wait_time_s": "600",  # of a loaded machine
        },
    )


def workers_of(process):
    """The processes that hold a model: actors of Ray Data."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            name = " ".join(child.cmdline())
        except psutil.Error:
            continue
        if name.startswith("ray::") and "MapBatches(ShardWorker)" in name:
            found.append(child)
    return found


def test_every_item_is_there_once_although_workers_are_killed(tmp_path):
    checkpoint = write_tiny_checkpoint(tmp_path / "model")
    corpus, output = tmp_path / "corpus", tmp_path / "shards"
    pictures = write_pictures(corpus, 160)
    process = start(checkpoint, corpus, output)
    killed = 0
    limit = time.monotonic() + LIMIT
    while process.poll() is None and killed < 2 and time.monotonic() < limit:
        num_done = len(list(output.glob("part-*.parquet")))
        if num_done >= 2 + 5 * killed:
            for worker in workers_of(process)[:1]:
                worker.send_signal(signal.SIGKILL)
                killed += 1
        time.sleep(0.05)
    stdout, stderr = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, stderr[-2000:]
    assert killed == 2
    summary = json.loads(stdout.strip().splitlines()[-1])
    assert (summary["shards"], summary["made"], summary["failed"]) == (16, 16, 0)
    shards = sorted(output.glob("*.parquet"))
    assert len(shards) == 16
    sources = Counter(s for path in shards for s in parquet.read_table(path)["source"].to_pylist())
    assert sources == Counter(map(str, pictures))


def test_a_run_that_is_killed_is_resumed(tmp_path):
    checkpoint = write_tiny_checkpoint(tmp_path / "model")
    corpus, output = tmp_path / "corpus", tmp_path / "shards"
    pictures = write_pictures(corpus, 120)
    process = start(checkpoint, corpus, output)
    limit = time.monotonic() + LIMIT
    while len(list(output.glob("part-*.parquet"))) < 3 and time.monotonic() < limit:
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    for child in children:  # Ray's own processes would end a little later
        if child.is_running():
            child.kill()
    first = {path.name: path.stat().st_mtime_ns for path in output.glob("*.parquet")}
    assert 3 <= len(first) < 12
    process = start(checkpoint, corpus, output)
    stdout, stderr = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, stderr[-2000:]
    assert json.loads(stdout.strip().splitlines()[-1])["made"] == 12 - len(first)
    shards = sorted(output.glob("*.parquet"))
    assert all((output / name).stat().st_mtime_ns == at for name, at in first.items())
    sources = Counter(s for path in shards for s in parquet.read_table(path)["source"].to_pylist())
    assert sources == Counter(map(str, pictures))


def test_errors_of_workers_are_those_of_the_package(tmp_path):
    process = start(tmp_path / "nothing", write_pictures(tmp_path / "c", 3)[0], tmp_path / "out")
    _, stderr = process.communicate(timeout=LIMIT)
    assert process.returncode == 2
    assert "nothing" in stderr and "Traceback" not in stderr


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'visavis\[ray\]'"):
        next(run_on_ray(EmbedJob("nano", "out"), [], workers=1, gpu=False))
