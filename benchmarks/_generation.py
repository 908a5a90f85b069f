"""What decode.py and prefill.py share: the same prompts through every generator, and a judge.

Knows prompts and times by name, not the engines behind them (`_generators.py`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from _harness import Engine, Report, engines, interleaved

JUDGE = "transformers"
CHECKED_TOKENS = 16  # at least so many tokens of one answer are judged
MAX_LEAD = 0.5  # logits; see `Transformers.judge`

Value = Callable[[dict[str, Any]], float]


def compare(
    report: Report,
    model: str,
    names: Sequence[str],
    *,
    what: str,
    prompt_tokens: int,
    new_tokens: int,
    value: Value,
    unit: str,
    ratios: Mapping[str, float],
    chat_template: str = "",
) -> None:
    """Add rows with `value` of what a run reports, for every generator in `names`.

    Args:
        model: a GGUF file, which every engine reads by itself; or what only visavis can load: its
            weights are then exported for transformers.
        names: engines; without transformers among them our own weights in float32 are the judge.
        chat_template: chat format of a file that has none.
    """
    runs = report.options.runs
    judged_by = JUDGE if JUDGE in names else "exact"
    processes = list(dict.fromkeys([*names, judged_by]))
    with (
        tempfile.TemporaryDirectory() as folder,
        engines("_generators.py", processes, report.options) as everyone,
    ):
        by_name = {engine.name: engine for engine in everyone}
        ours, judge = by_name["visavis"], by_name[judged_by]
        started = everyone[: len(names)]
        everyone_reads_it = model.endswith(".gguf")
        if not everyone_reads_it:
            ours.ask("export", model=model, folder=folder)
        for engine in everyone:
            own = everyone_reads_it or engine is ours
            format = (
                {"chat_template": chat_template}
                if chat_template and engine in (ours, judge)
                else {}
            )
            engine.ask("load", model=model if own else folder, **format)
        warm_up, *prompts = (
            ours.ask("prompt", tokens=prompt_tokens, number=number) for number in range(runs + 1)
        )
        for engine in started:
            count = max(new_tokens, CHECKED_TOKENS)
            answer = engine.ask("run", **warm_up, new_tokens=count)["ids"]
            lead = judge.ask("judge", ids=warm_up["ids"], answer=answer)["lead"]
            report.check(
                f"{what}, {engine.name}: in {count} tokens, largest lead of a better token over "
                "the one chosen (float32 logits)",
                lead,
                passed=lead <= MAX_LEAD,
            )
        measured = {
            engine.name: _measured(engine, prompts, new_tokens, value) for engine in started
        }
        report.add(what, interleaved(measured, runs), unit, ratios=ratios)


def compare_ways(
    report: Report, model: str, *, what: str, prompt_tokens: int, new_tokens: int, answers: int
) -> None:
    """Add rows for ways of decoding one GGUF file, beside llama.cpp: greedy and sampled without
    prompt lookup, and `answers` at a time."""
    runs = report.options.runs
    with engines("_generators.py", ["visavis", "llama.cpp"], report.options) as both:
        both[0].ask("load", model=model)
        both[1].ask("load", model=model, slots=answers)
        prompts = [
            both[0].ask("prompt", tokens=prompt_tokens, number=number) for number in range(runs)
        ]

        def one(engine: Engine, sampled: bool) -> Callable[[int], float]:
            settings = {"new_tokens": new_tokens, "guess": False, "sampled": sampled}
            return lambda run: (
                (new_tokens - 1) / engine.ask("run", **prompts[run], **settings)["decode_s"]
            )

        def some(engine: Engine) -> Callable[[int], float]:
            settings = {"new_tokens": new_tokens, "answers": answers}
            return lambda run: engine.ask("several", ids=prompts[run]["ids"], **settings)["rate"]

        for way, measured, ratio in (
            ("greedy, no guessing", {e.name: one(e, False) for e in both}, 1.75),
            ("sampled, no guessing", {e.name: one(e, True) for e in both}, 1.75),
            (f"{answers} answers at a time, in all", {e.name: some(e) for e in both}, 1),
        ):
            rates = interleaved(measured, runs)
            report.add(f"{what}, {way}", rates, "tokens/s", ratios={"llama.cpp": ratio})


def _measured(
    engine: Engine, prompts: list[dict[str, Any]], new_tokens: int, value: Value
) -> Callable[[int], float]:
    return lambda run: value(engine.ask("run", **prompts[run], new_tokens=new_tokens))
