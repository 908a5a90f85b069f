"""What lies in deploy/: settings that load, a unit that systemd takes, replicas under Ray."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.fakes import tiny_model, write_tiny_checkpoint
from visavis.serve import listen
from visavis.serve.config import hash_key, make_config, read_config

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"


def test_the_settings_load_and_are_those_of_the_image() -> None:
    settings = read_config(DEPLOY / "serve.yaml")
    config = make_config({**settings, "api_keys": [hash_key("key")]})
    image = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    assert f"EXPOSE {config.port}" in image
    assert "USER visavis" in image and "VOLUME /weights" in image
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    (service,) = compose["services"].values()
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert int(service["stop_grace_period"].removesuffix("s")) > config.drain_seconds
    for line in image.splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            for name in line.split()[1:-1]:
                assert (REPOSITORY / name).exists(), name


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = (DEPLOY / "visavis.service").read_text(encoding="utf-8")
    # What is checked is the unit, not what is installed on this machine.
    unit = unit.replace("/opt/visavis/bin/visavis", "/bin/true")
    (tmp_path / "visavis.service").write_text(unit, encoding="utf-8")
    command = ["systemd-analyze", "verify", str(tmp_path / "visavis.service")]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0 and not found.stderr.strip(), found.stderr


@pytest.mark.slow
def test_a_replica_is_killed_under_load(tmp_path: Path) -> None:
    """Two replicas, many clients that retry, one replica killed with -9: every request is answered
    in the end, and every answer with status 200 is whole and right."""
    ray = pytest.importorskip("ray")
    serve = pytest.importorskip("ray.serve")
    write_tiny_checkpoint(tmp_path / "tiny")
    config = {
        "models": {"tiny": str(tmp_path / "tiny")},
        "load": {"precision": "f32", "device": "cpu"},
    }
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    free = listen(0)
    port = free.getsockname()[1]
    free.close()
    paths = os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "src")))
    environment = {
        "VISAVIS_CONFIG": str(tmp_path / "serve.yaml"),
        "VISAVIS_MIN_REPLICAS": "2",
        "VISAVIS_MAX_REPLICAS": "2",
        "VISAVIS_REPLICA_CPUS": "0.5",
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    before = dict(os.environ)
    os.environ.update(environment)
    sys.path.insert(0, str(REPOSITORY))
    try:
        ray.init(
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100 * 2**20,
            runtime_env={"env_vars": environment},
        )
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        from deploy.ray_app import app

        serve.run(app, name="visavis")
        texts = {f"text {number}": None for number in range(12)}
        expected = dict(zip(texts, tiny_model().embed(list(texts)), strict=True))
        told = tiny_model().chat("Go", max_new_tokens=40).text
        counted = asyncio.run(load(f"http://127.0.0.1:{port}", expected, told))
        assert counted["right"] == counted["sent"] == 600, counted
        assert counted["killed"] == 1 and counted["pids"] >= 3, counted
    finally:
        serve.shutdown()
        ray.shutdown()
        sys.path.remove(str(REPOSITORY))
        os.environ.clear()
        os.environ.update(before)


async def load(address: str, expected: dict[str, Any], told: str) -> dict[str, int]:
    counted = {"sent": 0, "right": 0, "retried": 0, "killed": 0}
    pids: set[int] = set()

    async def request(client: httpx.AsyncClient, number: int) -> None:
        counted["sent"] += 1
        text = f"text {number % 12}"
        for _ in range(40):  # what every client of this kind does: wait and send it again
            try:
                if number % 5:
                    got = await client.post("/v1/embeddings", json={"input": text})
                else:
                    body = {"messages": [{"role": "user", "content": "Go"}], "max_tokens": 40}
                    got = await client.post("/v1/chat/completions", json=body)
                if got.status_code == 200:
                    found = got.json()
                    if number % 5:
                        vector = found["data"][0]["embedding"]
                        right = vector == pytest.approx(expected[text].tolist(), abs=1e-4)
                    else:
                        right = found["choices"][0]["message"]["content"] == told
                    counted["right"] += right
                    return
                assert got.status_code in (429, 500, 503), got.text
            except httpx.TransportError:
                pass
            counted["retried"] += 1
            await asyncio.sleep(0.25)

    async with httpx.AsyncClient(base_url=address, timeout=60, trust_env=False) as client:
        pids |= replicas()
        sending = []
        for number in range(600):
            sending.append(asyncio.create_task(request(client, number)))
            await asyncio.sleep(0.01)
            if number == 200:
                victim = min(pids)
                os.kill(victim, signal.SIGKILL)
                counted["killed"] += 1
        await asyncio.gather(*sending)
        deadline = time.monotonic() + 60
        while len(pids) < 3 and time.monotonic() < deadline:  # another one takes its place
            pids |= replicas()
            await asyncio.sleep(0.5)
    return {**counted, "pids": len(pids)}


def replicas() -> set[int]:
    """Return the processes of this test's replicas."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            name = (entry / "cmdline").read_bytes()
            environment = (entry / "environ").read_bytes()
        except (OSError, ValueError):
            continue
        if name.startswith(b"ray::ServeReplica") and b"VISAVIS_REPLICA_CPUS=0.5" in environment:
            found.add(int(entry.name))
    return found
