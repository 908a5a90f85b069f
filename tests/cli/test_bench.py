"""`visavis bench` as it is typed."""

from __future__ import annotations

import json

from tests.cli.conftest import Run


def test_bench(run: Run, tiny: str) -> None:
    options = ("--runs", "1", "--precision", "f32")
    done = run("bench", tiny, *options, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["model"] == "tiny"
    table = run("bench", tiny, "--runs", "1", "--precision", "f32")
    assert "decode, 8 at a time" in table.stdout and "reached" in table.stdout
