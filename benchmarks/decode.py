"""Tokens per second of an answer: one sequence, greedy.

    python benchmarks/decode.py [--threads N] [--runs N] [--json FILE] [--quick] [--model MODEL]

Measures SmolLM2 from its 4-bit GGUF file, then MODEL. Counts the tokens after the first: reading
the prompt is prefill.py's.
"""

from __future__ import annotations

from _generation import compare
from _harness import Report, parse_options

from visavis.checkpoints.load import resolve

PROMPT_TOKENS = 64


def main() -> int:
    options = parse_options("decode", __doc__, runs=5, model="nano")
    report = Report(options, "Decode, one sequence")
    new_tokens = 16 if options.quick else 128
    gguf = str(resolve("smollm2-135m"))
    for label, model, peers in (
        ("SmolLM2-135M Q4_1 GGUF", gguf, {"llama.cpp": 0.7, "transformers": 2}),
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
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
