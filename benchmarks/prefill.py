"""Time to the first token of an answer to a long prompt.

    python benchmarks/prefill.py [--threads N] [--runs N] [--json FILE] [--quick]

Measures SmolLM2 from its 4-bit GGUF file. A model's own fine-tuning changes no cost here, so there
is no second one.
"""

from __future__ import annotations

from _generation import compare
from _harness import Report, parse_options

from visavis.checkpoints.load import resolve


def main() -> int:
    options = parse_options("prefill", __doc__, runs=5)
    report = Report(options, "Prefill: time to the first token")
    prompt_tokens = 96 if options.quick else 512
    compare(
        report,
        str(resolve("smollm2-135m")),
        ["visavis", "llama.cpp", "transformers"],
        what=f"SmolLM2-135M Q4_1 GGUF, prompt of {prompt_tokens}",
        prompt_tokens=prompt_tokens,
        new_tokens=1,
        value=lambda times: times["prefill_s"],
        unit="s",
        ratios={"llama.cpp": 2},
    )
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
