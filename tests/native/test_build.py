"""The kernels are compiled anew: with sanitizers, for another processor, and not at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from visavis.native import build, library

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "src"
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, build.COMPILERS)), reason="there is no C++ compiler"
)


def runtime(name: str) -> str:
    """Return the path of a sanitizer's library, of the compiler that is used."""
    command = [*build.find_compiler(), f"-print-file-name={name}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"this compiler comes without {name}")
    return found


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="sanitizers are loaded as on Linux")
@pytest.mark.parametrize(
    ("flags", "libraries", "settings", "arguments"),
    [
        (
            ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
            ("libasan.so", "libubsan.so"),
            {"ASAN_OPTIONS": "detect_leaks=0"},  # Python's own
            (),
        ),
        (
            ("-fsanitize=thread",),
            ("libtsan.so",),
            {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1"},
            ("--no-fork",),  # it does not follow one
        ),
    ],
    ids=["address and undefined", "thread"],
)
def test_sanitizers_find_nothing(
    flags: tuple[str, ...],
    libraries: tuple[str, ...],
    settings: dict[str, str],
    arguments: tuple[str, ...],
    tmp_path: Path,
) -> None:
    output = tmp_path / "sanitized.so"
    preloaded = " ".join(map(runtime, libraries))
    build.compile_library(output, flags=("-O1", "-g", *flags))
    environment = {**os.environ, "LD_PRELOAD": preloaded, "PYTHONPATH": str(SOURCE), **settings}
    command = [sys.executable, str(HERE / "exercise.py"), str(output), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "exercised" in done.stdout and "Sanitizer" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["", "aarch64"])
def test_levels_agree(machine: str, tmp_path: Path) -> None:
    """Here, and on ARM, emulated, where its compiler and QEMU are installed."""
    compiler = ["aarch64-linux-gnu-g++"] if machine else build.find_compiler()
    emulator = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"] if machine else []
    for needed in (compiler[0], *emulator[:1]):
        if shutil.which(needed) is None:
            pytest.skip(f"{needed} is not installed")
    library, program = tmp_path / "liblevels.so", tmp_path / "levels"
    build.compile_library(library, compiler=compiler, machine=machine)
    link = [*compiler, "-std=c++17", str(HERE / "levels.cpp"), str(library), "-pthread"]
    subprocess.run([*link, f"-Wl,-rpath,{tmp_path}", "-o", str(program)], check=True)
    done = subprocess.run([*emulator, str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not machine or "neon: " in done.stdout


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler was found.*install GCC"):
        build.find_compiler()


def test_a_compiler_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    output = tmp_path / "library.so"
    output.write_text("the one before")
    with pytest.raises(build.BuildError, match="failed"):
        build.compile_library(output, compiler=[sys.executable])
    with pytest.raises(build.BuildError, match="cannot be run"):
        build.compile_library(output, compiler=[str(tmp_path / "nothing")])
    assert output.read_text() == "the one before" and len(list(tmp_path.iterdir())) == 1


def test_names_are_the_loaders() -> None:
    header = (build.SOURCES / "api.h").read_text()
    assert build.FILE_NAME == library.FILE_NAME
    assert f"#define VV_INTERFACE {library.INTERFACE}\n" in header
    for name, number in library.FORMATS.items():
        assert f"VV_{name} = {number}," in header


def found_with(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, str]:
    monkeypatch.setattr(library, "library_path", lambda: path)
    library.find.cache_clear()
    try:
        return library.find()
    finally:
        monkeypatch.undo()
        library.find.cache_clear()


def test_a_library_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing, damaged, or of other sources: PyTorch's operations are used, doctor says why."""
    monkeypatch.delenv(library.VARIABLE, raising=False)
    assert found_with(tmp_path / "none.so", monkeypatch)[1].startswith("not compiled")
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(b"no library")
    found, reason = found_with(damaged, monkeypatch)
    assert found is None and "damaged.so cannot be loaded" in reason
