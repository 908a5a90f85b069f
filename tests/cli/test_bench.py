"""`visavis bench` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

from tests.cli.conftest import Run


def test_bench(run: Run, tiny: str, tmp_path: Path) -> None:
    picture = tmp_path / "bench.svg"
    options = ("--runs", "1", "--precision", "f32", "--picture", str(picture))
    done = run("bench", tiny, *options, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["model"] == "tiny"
    ElementTree.parse(picture)
    table = run("bench", tiny, "--runs", "1", "--precision", "f32")
    assert "decode, 8 at a time" in table.stdout and "reached" in table.stdout
    assert run("bench", tiny, "--picture", "bench.gif").exit_code == 2
