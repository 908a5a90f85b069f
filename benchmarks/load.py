"""How long one waits before anything happens: imports, `--help`, loading models.

    python benchmarks/load.py [--threads N] [--runs N] [--json FILE] [--quick] [--model MODEL]

The files are in the system's page cache; what a disk adds is the same for everyone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from _harness import Engine, Report, engines, environment, interleaved, parse_options

from visavis.checkpoints.load import resolve

IDS = [504, 3575, 282, 4649, 314]  # "The capital of France is", as SmolLM2 spells it
COLD = "from starting Python to the first token"
WARM = "in a process that has loaded it before"


def main() -> int:
    options = parse_options("load", __doc__, model="nano")
    report = Report(options, "Start-up and loading")
    report.add(
        "import",
        interleaved(
            {
                "visavis": lambda run: command("-c", "import visavis"),
                "transformers": lambda run: command("-c", "import transformers"),
            },
            options.runs,
        ),
        "s",
        limit=0.5,
    )
    help_seconds = interleaved(
        {"visavis": lambda run: command("-m", "visavis", "--help")}, options.runs
    )
    report.add("`visavis --help`", help_seconds, "s", limit=0.5)

    file = str(resolve("smollm2-135m"))
    tokens: dict[str, set[int]] = {}

    def cold(name: str, model: str = file) -> float:
        started = time.perf_counter()
        with engines("_loaders.py", [name], options) as (engine,):
            answer = engine.ask("load", model=model, ids=IDS)
            seconds = time.perf_counter() - started
        tokens.setdefault(model, set()).add(answer["token"])
        return seconds

    names = ["visavis", "llama.cpp", "transformers"]
    samples = interleaved({name: lambda run, n=name: cold(n) for name in names}, options.runs)
    report.add(f"SmolLM2-135M Q4_1 GGUF, {COLD}", samples, "s")
    names = ["visavis", "llama.cpp"]  # transformers takes as long again, and teaches nothing new
    with engines("_loaders.py", names, options) as started:
        samples = warm(started, file, options.runs)
    report.add(f"SmolLM2-135M Q4_1 GGUF, {WARM}", samples, "s", limit=2)

    samples = interleaved({"visavis": lambda run: cold("visavis", options.model)}, options.runs)
    report.add(f"{options.model}, {COLD}", samples, "s")
    with engines("_loaders.py", ["visavis"], options) as started:
        samples = warm(started, options.model, options.runs)
    report.add(f"{options.model}, {WARM}", samples, "s", limit=3)

    different = len(tokens[file])
    report.check("different first tokens among the engines", different, passed=different == 1)
    return report.finish()


def warm(started: list[Engine], model: str, runs: int) -> dict[str, list[float]]:
    """Load in each engine once, then measure."""
    for engine in started:
        engine.ask("load", model=model, ids=IDS)
    return interleaved(
        {
            engine.name: lambda run, e=engine: e.ask("load", model=model, ids=IDS)["seconds"]
            for engine in started
        },
        runs,
    )


def command(*arguments: str) -> float:
    """Return how many seconds Python takes with these arguments, its own start included."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | environment(1),
    )
    return time.perf_counter() - started


if __name__ == "__main__":
    raise SystemExit(main())
