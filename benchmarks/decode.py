"""Tokens per second of an answer: greedy and sampled, guessing and not, one and eight at a time.

    python benchmarks/decode.py [--threads N] [--runs N] [--json FILE] [--quick] [--model MODEL]

Measures SmolLM2 from its 4-bit GGUF file, greedy with prompt lookup; then without it, greedy and
sampled, and eight answers at a time, where llama.cpp has eight slots; then MODEL, then files of
random weights as large as Llama 3.2's 1B, where the memory's speed counts. Counts the tokens after
the first: reading the prompt is prefill.py's.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from _generation import compare, compare_ways
from _harness import Report, parse_options
from _shapes import write_random

from visavis.checkpoints.load import resolve

PROMPT_TOKENS = 64


def main() -> int:
    options = parse_options("decode", __doc__, runs=5, model="nano")
    report = Report(options, "Decode, one sequence")
    new_tokens = 16 if options.quick else 128
    gguf = str(resolve("smollm2-135m"))
    for label, model, peers in (
        ("SmolLM2-135M Q4_1 GGUF", gguf, {"llama.cpp": 1, "transformers": 2}),
        (options.model, options.model, {"transformers": 2}),
    ):
        compare(
            report,
            model,
            ["visavis", *peers],
            what=f"{label}, {new_tokens} tokens after {PROMPT_TOKENS}",
            prompt_tokens=PROMPT_TOKENS,
            new_tokens=new_tokens,
            value=lambda times: (new_tokens - 1) / times["decode_s"],
            unit="tokens/s",
            ratios=peers,
        )
    compare_ways(
        report,
        gguf,
        what=f"SmolLM2-135M Q4_1 GGUF, {new_tokens} tokens after {PROMPT_TOKENS}",
        prompt_tokens=PROMPT_TOKENS,
        new_tokens=new_tokens,
        answers=8,
    )
    shape, new_tokens = ("0.1B", 16) if options.quick else ("1B", 64)
    for kind in ("Q8_0", "Q4_K_M"):
        with tempfile.TemporaryDirectory() as folder:
            compare(
                report,
                str(write_random(Path(folder) / f"{kind}.gguf", shape, kind)),
                ["visavis", "llama.cpp"],
                what=f"{shape} of random weights, {kind} GGUF, {new_tokens} tokens after "
                f"{PROMPT_TOKENS}",
                prompt_tokens=PROMPT_TOKENS,
                new_tokens=new_tokens,
                value=lambda times: (new_tokens - 1) / times["decode_s"],
                unit="tokens/s",
                ratios={"llama.cpp": 1},
                chat_template="mistral_instruct",
            )
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
