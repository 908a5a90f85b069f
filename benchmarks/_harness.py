"""What every benchmark shares: options, peers in processes of their own, fair order, a report.

    parent  ── {"do": "run", …} ──►  one process per engine, all pinned to the same cores
            ◄── {"seconds": …} ───   only one of them works at any time

Runs are interleaved (A B C A B C), after a warm-up, and reported as median, lowest and highest.
Knows no engine and no model; imports neither torch nor a peer.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
PACKAGES = (
    "visavis",
    "torch",
    "transformers",
    "sentence-transformers",
    "xllamacpp",
    "tokenizers",
    "numpy",
    "pillow",
)
BUSY = 0.1  # share of the processors used by other processes from which a report warns
REST_SECONDS = 0.2  # between engines: threads of the last one may still spin
OURS = "visavis"
LOW = ("s", "ms", "MB", "×")  # units in which less is better


@dataclass
class Options:
    """What the command line said."""

    name: str
    threads: int
    runs: int
    quick: bool
    json: Path | None
    model: str


def parse_options(name: str, description: str | None, *, runs: int = 3, model: str = "") -> Options:
    """Read the command line of one benchmark.

    Args:
        runs: the default without --quick.
        model: the default of --model; empty where there is no choice.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = len(usable_cores())
    parser.add_argument("--threads", type=int, default=cores, help=f"cores to use ({cores})")
    parser.add_argument("--runs", type=int, help=f"measured runs of each engine ({runs})")
    parser.add_argument("--json", type=Path, help=f"report file (benchmarks/results/{name}.json)")
    parser.add_argument("--quick", action="store_true", help="one tiny run, and no report file")
    if model:
        parser.add_argument("--model", default=model, help=f"bundled name or path ({model})")
    chosen = parser.parse_args()
    if not 1 <= chosen.threads <= cores:
        parser.error(f"--threads is {chosen.threads}, expected 1 to {cores} on this machine")
    if chosen.runs is not None and chosen.runs < 1:
        parser.error(f"--runs is {chosen.runs}, expected at least 1")
    report = chosen.json or (None if chosen.quick else RESULTS / f"{name}.json")
    count = chosen.runs or (1 if chosen.quick else runs)
    return Options(name, chosen.threads, count, chosen.quick, report, chosen.model if model else "")


# ---- engines in processes of their own -----------------------------------------------------------


class Engine:
    """The parent's end of one engine's process."""

    def __init__(self, script: str, name: str, threads: int) -> None:
        self.name = name
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed in close
        self.process = subprocess.Popen(
            [sys.executable, str(FOLDER / script), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | environment(threads),
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Call a method of the engine and return its answer.

        Raises:
            SystemExit: it failed; the message holds its traceback.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self._fail(do, "")
        line = self.process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": ""}
        if "error" in answer:
            self._fail(do, answer["error"])
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()

    def _fail(self, do: str, error: str) -> None:
        self.log.seek(0)
        raise SystemExit(
            f"{self.name} failed at {do!r}:\n{error or self.log.read()[-4000:]}\n"
            "If a package is missing, install the peers with: pip install -e '.[bench,demo,train]'"
        )


@contextmanager
def engines(script: str, names: Sequence[str], options: Options) -> Iterator[list[Engine]]:
    """Start one process per name; all have ended when the block is left."""
    with ExitStack() as stack:
        started = []
        for name in names:
            engine = Engine(script, name, options.threads)
            stack.callback(engine.close)
            started.append(engine)
        yield started


def serve(kinds: Mapping[str, Callable[[], Any]]) -> None:
    """Be the engine named on the command line: a method call per line in, a result per line out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print must not mix with answers
    pin_to_cores(int(os.environ["OMP_NUM_THREADS"]))
    engine = kinds[sys.argv[1]]()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(engine, request.pop("do"))(**request)
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


def interleaved(
    measured: Mapping[str, Callable[[int], float]], runs: int
) -> dict[str, list[float]]:
    """Run every engine in turn, `runs` times over: A B C A B C. Returns samples by name.

    Each function is given the number of the run, so that no run repeats the input of another and
    no cache of results helps.
    """
    samples: dict[str, list[float]] = {name: [] for name in measured}
    for number in range(runs):
        for name, once in measured.items():
            time.sleep(REST_SECONDS)
            samples[name].append(once(number))
    return samples


def environment(threads: int) -> dict[str, str]:
    """Return variables that hold every engine to a number of threads, and offline."""
    counted = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    fixed = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return dict.fromkeys(counted, str(threads)) | fixed


def usable_cores() -> list[int]:
    """Return the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def pin_to_cores(count: int) -> None:
    """Keep this process on the first `count` cores, whatever its libraries start."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, usable_cores()[:count])


# ---- other processes -----------------------------------------------------------------------------


@dataclass(frozen=True)
class CpuClock:
    """CPU seconds at one moment, to measure how much other processes use during a run."""

    wall: float
    machine: float  # of all processes, and what a hypervisor took
    own: float  # of this process and its children

    @classmethod
    def now(cls) -> CpuClock:
        times = psutil.cpu_times()
        kinds = ("user", "nice", "system", "irq", "softirq", "steal")
        own = sum(os.times()[:4])  # children that have ended are in it, living ones are not
        for child in psutil.Process().children(recursive=True):
            try:
                own += sum(child.cpu_times()[:2])
            except psutil.NoSuchProcess:
                continue
        return cls(time.monotonic(), sum(getattr(times, kind, 0.0) for kind in kinds), own)

    def share_of_others(self, since: CpuClock) -> float:
        """Return the share (0 to 1) of all processors that other processes used since then."""
        others = (self.machine - since.machine) - (self.own - since.own)
        available = (self.wall - since.wall) * (psutil.cpu_count() or 1)
        return min(max(others / available, 0.0), 1.0) if available > 0 else 0.0


# ---- the report ----------------------------------------------------------------------------------


@dataclass
class Report:
    """Rows of one benchmark, what was checked, and where it ran."""

    options: Options
    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    parity: list[dict[str, Any]] = field(default_factory=list)
    started: CpuClock = field(default_factory=CpuClock.now)

    def add(
        self,
        what: str,
        samples: Mapping[str, Sequence[float]],
        unit: str,
        *,
        ratios: Mapping[str, float] | None = None,
        limit: float | None = None,
    ) -> None:
        """Add one row per engine. Times and sizes are better low, any other unit better high.

        Args:
            ratios: by peer, how many times as fast as it we want to be.
            limit: of our own value, what we want to stay under.
        """
        medians = {name: statistics.median(values) for name, values in samples.items()}
        for name, values in samples.items():
            row = {
                "what": what,
                "engine": name,
                "unit": unit,
                "median": medians[name],
                "low": min(values),
                "high": max(values),
                "samples": list(values),
            }
            if name == OURS:
                row |= {"limit": limit, "met": limit is None or medians[name] < limit}
            else:
                ratio = medians[OURS] / medians[name]
                ratio = 1 / ratio if unit in LOW else ratio
                target = (ratios or {}).get(name)
                row |= {"ratio": ratio, "target": target, "met": target is None or ratio >= target}
            self.rows.append(row)

    def check(self, what: str, value: float, *, passed: bool) -> None:
        """Record one comparison that shows that the engines computed the same."""
        self.parity.append({"what": what, "value": value, "passed": bool(passed)})

    def finish(self) -> int:
        """Print the report, write the file; return the exit status: 1 when a check failed."""
        result = {
            "benchmark": self.options.name,
            "title": self.title,
            "command": shlex.join(["python", f"benchmarks/{self.options.name}.py", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "threads": self.options.threads,
            "runs": self.options.runs,
            "quick": self.options.quick,
            "other_processes": round(CpuClock.now().share_of_others(self.started), 3),
            "machine": machine(),
            "versions": versions(),
            "rows": self.rows,
            "parity": self.parity,
        }
        print(markdown(result))
        if self.options.json is not None:
            self.options.json.parent.mkdir(parents=True, exist_ok=True)
            self.options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return 0 if all(check["passed"] for check in self.parity) else 1


def machine() -> dict[str, Any]:
    """Describe the hardware, without the name of the host."""
    model, memory = platform.processor(), 0.0
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        model = named[0] if named else model
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": model or platform.machine(),
        "cores": len(usable_cores()),
        "memory_gib": round(memory),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that are compared."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def markdown(result: dict[str, Any]) -> str:
    """Return a result as a section of markdown, for the terminal and for the docs."""
    where = result["machine"]
    peers = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"### {result['title']}",
        "",
        f"`{result['command']}`, {result['date']}: {result['threads']} of {where['cores']} cores "
        f"of {where['processor']}, {where['memory_gib']} GiB, {where['system']}, "
        f"Python {where['python']}; {peers}. Median of {result['runs']}. {_others(result)}",
    ]
    if result["quick"]:
        lines += ["", "**Not a measurement: a --quick run.**"]
    lines += [
        "",
        "| what | engine | median | lowest – highest | visavis is | target |",
        "|---|---|---:|---:|---:|---|",
    ]
    last = ""
    for row in result["rows"]:
        what, last = row["what"] if row["what"] != last else "", row["what"]
        lines.append(
            f"| {what} | {row['engine']} | {number(row['median'])} {row['unit']} | "
            f"{number(row['low'])} – {number(row['high'])} | {_ratio(row)} | {_target(row)} |"
        )
    lines += ["", "Same work:", ""]
    for check in result["parity"]:
        verdict = "" if check["passed"] else " **failed**"
        lines.append(f"- {check['what']}: {check['value']:.5g}{verdict}")
    return "\n".join(lines) + "\n"


def _others(result: dict[str, Any]) -> str:
    share = result["other_processes"]
    if share is None:
        return "CPU time of other processes: not recorded."
    warning = ": times are too high, only ratios can be compared" if share > BUSY else ""
    return f"Other processes used {share:.0%} of the processors{warning}."


def number(value: float) -> str:
    """Return a number with three significant digits, never in exponents."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ratio(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.2f}×" if "ratio" in row else ""


def _target(row: dict[str, Any]) -> str:
    goal = row.get("target", row.get("limit"))
    if goal is None:
        return ""
    wanted = f"≥ {goal:g}×" if "ratio" in row else f"< {goal:g} {row['unit']}"
    return wanted if row["met"] else f"{wanted}, missed"
