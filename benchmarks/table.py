"""Put measured results into docs/performance.md and README.md, between their marks.

    python benchmarks/table.py [--check]

Reads all of benchmarks/results/*.json. --check writes nothing and exits with 1 if a page differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from _harness import FOLDER, OURS, RESULTS, markdown, number

PAGE = FOLDER.parent / "docs" / "performance.md"
README = FOLDER.parent / "README.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
ORDER = ("decode", "prefill", "picture", "embed", "train", "gradcache", "load", "serve", "cuda")
PEERS = ("llama.cpp", "transformers")
GGUF = "SmolLM2-135M Q4_1 GGUF"
SUMMARY = (  # of the README: benchmark, start of the row's `what`, label
    ("decode", GGUF, "decode, 135M, 4-bit GGUF"),
    ("decode", "1B of random weights, Q8_0", "decode, 1B, Q8_0 GGUF"),
    ("decode", "1B of random weights, Q4_K_M", "decode, 1B, Q4_K_M GGUF"),
    ("decode", "nano", "decode, nano"),
    ("prefill", GGUF, "prefill of 512 tokens, 135M, 4-bit GGUF"),
    ("embed", "mixed:", "embedding texts and images, nano"),
    ("train", "3 steps", "training step"),
    ("load", f"{GGUF}, from starting", "start of Python to first token, 135M, 4-bit GGUF"),
    ("load", "nano, from starting", "start of Python to first token, nano"),
    ("load", "import", "import of the package"),
)


def read_results() -> list[dict[str, Any]]:
    """Read the reports in benchmarks/results, in the order of the page."""
    files = sorted(RESULTS.glob("*.json"))
    if not files:
        raise SystemExit(f"no reports in {RESULTS}; measure first: make bench")
    results = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    return sorted(results, key=lambda result: ORDER.index(result["benchmark"]))


def summary(results: list[dict[str, Any]]) -> str:
    """Return the README's table: our median, and how many times as fast as each peer."""
    rows = {result["benchmark"]: result["rows"] for result in results}
    lines = [f"| | {OURS} | vs. {' | vs. '.join(PEERS)} |", "|---|---:|---:|---:|"]
    for benchmark, start, label in SUMMARY:
        found = {r["engine"]: r for r in rows.get(benchmark, ()) if r["what"].startswith(start)}
        if OURS in found:
            cells = [f"{number(found[OURS]['median'])} {found[OURS]['unit']}"]
            cells += [f"{found[one]['ratio']:.2f}×" if one in found else "" for one in PEERS]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def filled(path: Path, content: str) -> str:
    """Return the text of a page with content between its marks."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{path} has no {BEGIN} … {END}; put both lines where tables belong")
    return f"{before}{BEGIN}\n\n{content}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args().check
    results = read_results()
    pages = {PAGE: "\n".join(map(markdown, results)), README: summary(results)}
    differ = 0
    for path, content in pages.items():
        text = filled(path, content)
        if check:
            differ += text != path.read_text(encoding="utf-8")
        else:
            path.write_text(text, encoding="utf-8")
    print(f"{', '.join(result['benchmark'] for result in results)}: {differ} pages differ")
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
