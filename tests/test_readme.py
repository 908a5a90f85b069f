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
MARK = r"<!-- executed by tests/test_readme.py{which} -->\n```{language}\n(.*?)```"


def example(language: str, which: str = "") -> str:
    pattern = MARK.format(language=language, which=which)
    found = re.findall(pattern, README.read_text("utf-8"), re.DOTALL)
    assert len(found) == 1, f"README has {len(found)} marked {language} examples{which}"
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
    run_lines(example("bash"), folder)
    assert (folder / "vectors.npy").is_file()


@pytest.mark.slow
def test_training_example(own_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(README.parent / "recipes")
    run_lines(example("bash", ": training"), tmp_path)
    report = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "finetune" in report


def run_lines(lines: str, folder: Path) -> None:
    """Run each line in a folder; none may fail or print nothing."""
    scripts = sysconfig.get_path("scripts")
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    for command in lines.strip().splitlines():
        done = subprocess.run(
            command, shell=True, cwd=folder, capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        assert done.stdout.strip(), f"{command} printed nothing"
