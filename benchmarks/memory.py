"""How much memory a model takes: while it is loaded, while it reads a prompt, while it answers.

    python benchmarks/memory.py [--shape 1B] [--kinds Q8_0 Q4_K_M] [--json FILE]

Writes files of random weights to a temporary folder, and measures each in a process of its own. The
target: once loaded, at most 1.15 times the file and 300 MB, of which PyTorch itself takes most. The
last column is the most that was held until 8 tokens were said after a prompt of 512. A minute.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from _shapes import SHAPES, write_random

FACTOR, ALLOWANCE = 1.15, 300e6
PROMPT_TOKENS, NEW_TOKENS = 512, 8


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="1B")
    parser.add_argument("--kinds", nargs="+", default=["Q8_0", "Q4_K_M"])
    parser.add_argument("--json", type=Path, help="report file")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.kinds:
            path = write_random(Path(folder) / f"{kind}.gguf", options.shape, kind)
            command = [sys.executable, __file__, "--measure", str(path)]
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            if ended.returncode:
                raise SystemExit(ended.stderr)
            size = path.stat().st_size
            row = {"shape": options.shape, "kind": kind, "file": size, **json.loads(ended.stdout)}
            row["limit"] = FACTOR * size + ALLOWANCE
            row["share"] = row["loaded"] / row["limit"]
            rows.append(row)
            path.unlink()
    print("| shape | type | file | before | loaded | limit | peak of loading | peak of all |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        keys = ("file", "before", "loaded", "limit", "peak_loading", "peak")
        sizes = " | ".join(f"{row[key] / 1e6:.0f} MB" for key in keys)
        print(f"| {row['shape']} | {row['kind']} | {sizes} |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["share"] <= 1 for row in rows) else 1


def measure(path: Path) -> dict[str, int]:
    """Load a model, read a prompt and answer; return bytes of memory on the way."""
    import torch

    import visavis.api
    from visavis.generate.engine import generate
    from visavis.processing.chat_template import Encoded
    from visavis.processing.collate import pack

    torch.ones(64, 64).bfloat16() @ torch.ones(64, 64).bfloat16()
    found = {"before": resident("VmRSS")}
    model = visavis.api.load(path)
    found |= {"loaded": resident("VmRSS"), "peak_loading": resident("VmHWM")}
    batch = pack([Encoded([7] * PROMPT_TOKENS, [], [False] * PROMPT_TOKENS)])
    said = generate(
        model.vlm,
        batch,
        lambda scores: int(scores.argmax()),
        max_new_tokens=NEW_TOKENS,
        stop_ids=frozenset(),
    )
    assert len(list(said)) == NEW_TOKENS
    return found | {"answered": resident("VmRSS"), "peak": resident("VmHWM")}


def resident(field: str) -> int:
    """Return a line of Linux's memory report in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    match = re.search(field + r":\s+(\d+)", status)
    assert match is not None
    return int(match[1]) * 1024


if __name__ == "__main__":
    raise SystemExit(main())
