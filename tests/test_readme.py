"""The README's examples are run as written, on real pictures and the real nano."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
MARK = r"<!-- executed by tests/test_readme.py -->\n```{language}\n(.*?)```"


def example(language: str) -> str:
    found = re.findall(MARK.format(language=language), README.read_text("utf-8"), re.DOTALL)
    assert len(found) == 1, f"README has {len(found)} marked {language} examples"
    return str(found[0])


@pytest.fixture
def folder(tmp_path: Path, nano_files: object) -> Path:
    """A folder with the pictures that the README speaks of."""
    import skimage

    pictures = Path(skimage.__file__).parent / "data"
    (tmp_path / "pictures").mkdir()
    for name in ("coffee.png", "chelsea.png", "rocket.jpg", "coins.png"):
        shutil.copy(pictures / name, tmp_path / "pictures" / name)
    shutil.copy(pictures / "coffee.png", tmp_path)
    return tmp_path


def test_python_example(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", example("python")], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    hits = re.findall(r"^-?\d\.\d\d  (\S+)$", done.stdout, re.MULTILINE)
    assert len(hits) == 3
    assert Path(hits[0]).name == "coffee.png"


def test_shell_example(folder: Path) -> None:
    scripts = sysconfig.get_path("scripts")
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    for command in example("bash").strip().splitlines():
        done = subprocess.run(
            command, shell=True, cwd=folder, capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        assert done.stdout.strip(), f"{command} printed nothing"
    assert (folder / "vectors.npy").is_file()
