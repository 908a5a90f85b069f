"""`visavis serve` as a process: stopped while it works, killed, its files changed, its memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fakes import picture, tiny_model, write_tiny_checkpoint
from tests.serve.serving import client_of, data_uri
from visavis import Index

pytestmark = pytest.mark.slow


@contextmanager
def process(*arguments: str, env: dict[str, str] | None = None) -> Iterator[tuple[str, Any]]:
    """Yield the address of a server in a process of its own, and the process."""
    running = subprocess.Popen(
        [sys.executable, "-m", "visavis", "serve", *arguments, "--port", "0", "--precision", "f32"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
    )
    assert running.stderr is not None
    try:
        address = running.stderr.readline().split("serving on ")[1].split("/ ")[0]
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.extend(running.stderr or ()))
        reader.start()
        running.lines = lines  # type: ignore[attr-defined]
        yield address, running
    finally:
        running.kill()
        running.wait()
        running.stderr.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "tiny")


LONG = {"messages": [{"role": "user", "content": "Go"}], "max_tokens": 480}


def test_sigterm_lets_unfinished_requests_finish(model: Path) -> None:
    expected = tiny_model().chat("Go", max_new_tokens=480).text
    with process(str(model), "--log-format", "json") as (address, running):
        answers: list[str] = []

        def stream() -> None:
            text = ""
            with (
                client_of(address) as client,
                client.stream("POST", "/v1/chat/completions", json={**LONG, "stream": True}) as got,
            ):
                begun.release()
                for line in got.iter_lines():
                    if line.startswith("data: {"):
                        for choice in json.loads(line[6:])["choices"]:
                            text += choice["delta"].get("content", "")
            answers.append(text)

        with client_of(address) as client:
            client.post("/v1/embeddings", json={"input": "loads the model"})
            begun = threading.Semaphore(0)
            threads = [threading.Thread(target=stream) for _ in range(8)]
            for thread in threads:
                thread.start()
            for _ in threads:
                assert begun.acquire(timeout=60)
            running.send_signal(signal.SIGTERM)
            for thread in threads:
                thread.join(60)
            assert answers == [expected] * 8
            assert running.wait(60) in (0, -signal.SIGTERM)
            with pytest.raises(httpx.HTTPError):
                client.get("/healthz")
        time.sleep(0.1)
        logged = [json.loads(line) for line in running.lines]
        finished = [one for one in logged if "/v1/chat" in one["message"]]
        assert len(finished) == 8
        assert all(one["status"] == 200 and one["request_id"] for one in finished)


def test_kill_and_restart_lose_nothing_that_was_acknowledged(model: Path, tmp_path: Path) -> None:
    index = tmp_path / "test.idx"
    acknowledged: list[str] = []
    for round_number in range(4):
        with process(str(model), "--index", f"notes={index}") as (address, running):
            killing = threading.Timer(0.5 + 0.2 * round_number, running.kill)
            with client_of(address) as client:
                client.post("/v1/embeddings", json={"input": "loads the model"})
                killing.start()
                for number in range(100_000):
                    name = f"{round_number}-{number}"
                    body = {"items": [{"source": name, "text": f"note {name}"}]}
                    try:
                        report = client.post("/v1/indexes/notes/items", json=body).json()
                    except httpx.HTTPError:
                        break
                    assert report["added"] == 1
                    acknowledged.append(name)
            killing.cancel()
    with Index(index, tiny_model()) as opened:
        kept = {item.source for item in opened.items(10**6)}
        assert set(acknowledged) <= kept
        assert len(kept) <= len(acknowledged) + 4  # at most one unacknowledged a kill
        found = opened.search(f"note {acknowledged[-1]}", k=1)
        assert found[0].score == pytest.approx(1, abs=1e-4)
    assert len(acknowledged) > 20


def test_a_model_file_that_changes_under_the_server(model: Path) -> None:
    with process(f"tiny={model}") as (address, running), client_of(address) as client:
        body = {"input": ["a cat", {"image": data_uri(picture(1))}]}
        before = client.post("/v1/embeddings", json=body).json()["data"]
        (weights,) = model.glob("*.safetensors")
        other = write_tiny_checkpoint(model.parent / "other", seed=3)
        shutil.copyfile(next(other.glob("*.safetensors")), weights)  # in place
        assert client.post("/v1/embeddings", json=body).json()["data"] == before
        os.truncate(weights, 100)
        assert client.post("/v1/embeddings", json=body).json()["data"] == before
        weights.unlink()
        assert client.post("/v1/embeddings", json=body).json()["data"] == before
        # Loaded again it is missing: an error of that model, and the process lives.
        unload = {"model": "tiny", "keep_alive": 0}
        client.post("/api/generate", json=unload)
        deadline = time.monotonic() + 30
        while client.get("/api/ps").json()["models"] and time.monotonic() < deadline:
            time.sleep(0.1)
        missing = client.post("/v1/embeddings", json=body)
        assert missing.status_code == 503
        assert str(model) not in missing.text
        shutil.copyfile(next(other.glob("*.safetensors")), weights)
        again = client.post("/v1/embeddings", json=body)
        assert again.status_code == 200
        assert again.json()["data"] != before
        assert running.poll() is None


def test_memory_is_stable_and_returned(model: Path) -> None:
    """Answers, embeddings, images and clients that leave; then the same again, several times."""

    def resident() -> float:
        status = Path(f"/proc/{running.pid}/status").read_text(encoding="utf-8")
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024  # MB

    with process(str(model)) as (address, running), client_of(address) as client:

        def work() -> None:
            for number in range(30):
                client.post(
                    "/v1/embeddings", json={"input": [f"t {number} {n}" for n in range(99)]}
                )
                part = {"type": "image_url", "image_url": data_uri(picture(number))}
                message = {"role": "user", "content": [part]}
                client.post("/v1/chat/completions", json={"messages": [message], "max_tokens": 9})
                with suppress(httpx.TimeoutException):
                    client.post("/v1/chat/completions", json=LONG, timeout=0.02)

        for _ in range(2):
            work()
        before = resident()
        for _ in range(6):
            work()
        assert resident() < before + 40


def test_an_api_key_comes_from_the_environment(model: Path) -> None:
    with (
        process(str(model), env={"VISAVIS_API_KEY": "secret-key"}) as (address, running),
        client_of(address) as client,
    ):
        assert client.get("/v1/models").status_code == 401
        header = {"authorization": "Bearer secret-key"}
        assert client.get("/v1/models", headers=header).status_code == 200
        time.sleep(0.2)
        assert "secret-key" not in "".join(running.lines)


def test_a_configuration_file_serves_several_models(model: Path, tmp_path: Path) -> None:
    other = write_tiny_checkpoint(tmp_path / "other", seed=1)
    file = tmp_path / "serve.yaml"
    file.write_text(
        f"models:\n  first: {model}\n  second: {other}\nload: {{precision: f32}}\n"
        "limits: {new_tokens: 5}\n",
        encoding="utf-8",
    )
    with process("--config", str(file)) as (address, _), client_of(address) as client:
        assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["first", "second"]
        vectors = [
            client.post("/v1/embeddings", json={"input": "a cat", "model": name}).json()
            for name in ("first", "second")
        ]
        for seed, found in enumerate(vectors):
            expected = tiny_model(seed).embed(["a cat"])[0]
            assert found["data"][0]["embedding"] == pytest.approx(expected.tolist(), abs=1e-5)
        assert client.post("/v1/chat/completions", json=LONG).status_code == 400
