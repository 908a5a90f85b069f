"""Put measured results into docs/performance.md, between its two marks.

python benchmarks/table.py [benchmarks/results/*.json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from _harness import FOLDER, RESULTS, markdown

PAGE = FOLDER.parent / "docs" / "performance.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
ORDER = ("decode", "prefill", "picture", "embed", "train", "gradcache", "load", "cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="reports (all in benchmarks/results)")
    files = parser.parse_args().files or sorted(RESULTS.glob("*.json"))
    if not files:
        raise SystemExit(f"no reports in {RESULTS}; measure first: make bench")
    results = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    results.sort(key=lambda result: ORDER.index(result["benchmark"]))
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{PAGE} has no {BEGIN} … {END}; put both lines where tables belong")
    tables = "\n".join(markdown(result) for result in results)
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables}\n{END}{after}", encoding="utf-8")
    print(f"wrote {', '.join(result['benchmark'] for result in results)} into {PAGE.name}")


if __name__ == "__main__":
    main()
