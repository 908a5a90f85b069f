"""Compiles the kernels: with `pip install` (hatch_build.py), or as a script by itself.

Needs GCC or Clang, as `$CXX`, `c++`, `g++` or `clang++`, and nothing else; imports nothing of the
package, because it runs before that is installed. The kernels of every level of a processor family
go into one library, which chooses at run time.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
FILE_NAME = {"win32": "visavis_native.dll", "darwin": "libvisavis_native.dylib"}.get(
    sys.platform, "libvisavis_native.so"
)
COMPILERS = ("c++", "g++", "clang++")
COMMON = ("dispatch", "pack", "step", "team")
# Compiled once for each: the number that VV_LEVEL has in simd.h, and the processor's flags.
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx2 -mfma -mf16c"
PORTABLE = ("4", "")
LEVELS = {
    "x86_64": (("1", AVX512), ("2", "-mavx2 -mfma -mf16c"), PORTABLE),
    "aarch64": (("3", "-march=armv8.2-a+dotprod"), PORTABLE),
}
FAMILY = {"amd64": "x86_64", "arm64": "aarch64"}
# Every sum is made in the order that is written, so that compilers agree. GCC 12 warns of its own
# intrinsics.
FLAGS = (
    *("-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-pthread"),
    *("-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-pragmas"),
)


class BuildError(RuntimeError):
    """There is no compiler, or it refused the sources."""


def find_compiler() -> list[str]:
    """Return the command of a C++ compiler.

    Raises:
        BuildError: none is found.
    """
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise BuildError(
        f"no C++ compiler was found (looked for $CXX, {', '.join(COMPILERS)}); install GCC or Clang"
    )


def compile_library(
    output: Path,
    *,
    compiler: Sequence[str] | None = None,
    flags: Sequence[str] = (),
    machine: str = "",
) -> None:
    """Compile the kernels to a shared library.

    Args:
        output: its path; it is replaced at once, when all has worked.
        compiler: the command; by default `find_compiler`.
        flags: more of the compiler's flags, such as sanitizers.
        machine: the processor's family, for a compiler of another one.

    Raises:
        BuildError: the compiler refused; its message follows.
    """
    command = list(compiler or find_compiler())
    machine = (machine or platform.machine()).lower()
    levels = LEVELS.get(FAMILY.get(machine, machine), (PORTABLE,))
    everywhere = [*FLAGS, *flags, *([] if sys.platform == "win32" else ["-fPIC"])]
    with tempfile.TemporaryDirectory() as folder:
        objects: list[str] = []
        commands: list[list[str]] = []
        for name in COMMON:
            objects.append(str(Path(folder) / f"{name}.o"))
            commands.append(["-c", str(SOURCES / f"{name}.cpp"), "-o", objects[-1]])
        for number, features in levels:
            objects.append(str(Path(folder) / f"level{number}.o"))
            source = [f"-DVV_LEVEL={number}", *features.split(), "-c", str(SOURCES / "level.cpp")]
            commands.append([*source, "-o", objects[-1]])
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(_run, ([*command, *everywhere, *rest] for rest in commands)))
        linked = output.with_name(output.name + ".part")
        link = [*command, "-shared", "-pthread", *flags, *objects, "-o", str(linked)]
        try:  # its own C++ runtime, so that any Python can load it
            _run([*link, "-static-libstdc++", "-static-libgcc"])
        except BuildError:
            _run(link)
        os.replace(linked, output)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise BuildError(f"{shlex.join(command)} failed:\n{done.stderr.strip()}")


def main() -> int:
    """Compile the library to where the package looks for it."""
    try:
        compile_library(Path(__file__).parent / FILE_NAME)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(Path(__file__).parent / FILE_NAME)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
