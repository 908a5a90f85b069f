"""`visavis bench`, `doctor` and `fetch`: speed, installation checks and bundled weights."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from visavis import __version__
from visavis.cli.common import (
    JsonOption,
    Loading,
    ModelArgument,
    human_bytes,
    loads_a_model,
    print_columns,
    print_json,
    say,
    show_progress,
)


@loads_a_model
def bench(
    model: ModelArgument = "nano",
    runs: Annotated[
        int, typer.Option(min=1, metavar="N", help="Number of measurements of each rate.")
    ] = 3,
    as_json: JsonOption = False,
    *,
    loading: Loading,
) -> None:
    """Benchmark load, prefill, decode and embedding against the hardware roofline.

    The roofline comes from the measured memory bandwidth and matrix-product throughput of this
    machine. Close other programs first: they distort the numbers.

    [bold]Examples[/bold]

      visavis bench

      visavis bench model.gguf --precision bf16 --json
    """
    from visavis.bench import BenchReport, measure

    started = time.perf_counter()
    loaded = loading.load(model)
    report = None
    for progress in measure(loaded, time.perf_counter() - started, runs=runs):
        if isinstance(progress, BenchReport):
            report = progress
        elif show_progress():
            say(f"measuring {progress}")
    assert report is not None
    if as_json:
        print_json(report.to_dict())
        return
    machine = report.machine
    typer.echo(
        f"{report.model}: {report.parameters / 1e6:.0f} M parameters, "
        f"{human_bytes(report.weight_bytes)} of weights read per generated token, "
        f"{human_bytes(report.resident_bytes)} resident"
    )
    typer.echo(
        f"{machine.device}, {machine.threads} threads: {machine.bandwidth / 1e9:.1f} GB/s memory "
        f"bandwidth, {machine.flops / 1e9:.0f} GFLOP/s ({machine.dtype})\n"
    )
    rows = [("stage", "median", "min – max", "roofline", "reached")]
    for row in report.rows:
        floor = "" if row.floor is None else f"{row.floor:.3g} {row.unit}"
        share = "" if row.share is None else f"{row.share:.0%}"
        spread = f"{row.lowest:.3g} – {row.highest:.3g}"
        rows.append((row.name, f"{row.value:.3g} {row.unit}", spread, floor, share))
    print_columns(rows)


EXIT_BROKEN = 1
REQUIRED = ("torch", "numpy", "pillow", "tokenizers", "safetensors", "jinja2", "typer")
OPTIONAL = {
    "scikit-image": "demo",
    "scikit-learn": "demo",
    "starlette": "serve",
    "uvicorn": "serve",
    "easy-vqa": "train",
    "av": "video",
    "pypdfium2": "pdf",
}


def doctor(as_json: JsonOption = False) -> None:
    """Check the installation and the machine.

    Prints versions, processor features and the weight cache; exit code 1 if there are problems.

    [bold]Examples[/bold]

      visavis doctor

      visavis doctor --json > report.json
    """
    problems: list[str] = []
    report = {
        "versions": _versions(problems),
        "machine": _machine(),
        "torch": _torch(problems),
        "compiled kernels": _kernels(),
        "cache": _cache(problems),
    }
    _check_torchvision(problems)
    if as_json:
        print_json({**report, "problems": problems})
    else:
        for title, facts in report.items():
            typer.secho(title, bold=True)
            print_columns([[f"  {name}", str(value)] for name, value in facts.items()])
        typer.secho("problems" if problems else "no problems found", bold=True)
        for problem in problems:
            typer.echo(f"  {problem}")
    if problems:
        raise typer.Exit(EXIT_BROKEN)


def _versions(problems: list[str]) -> dict[str, str]:
    found = {"visavis": __version__, "python": platform.python_version()}
    for name in REQUIRED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
            problems.append(f"{name} is not installed; run: pip install visavis")
    for name, extra in OPTIONAL.items():
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = f"not installed (optional: pip install 'visavis[{extra}]')"
    return found


def _machine() -> dict[str, Any]:
    flags = _cpu_flags()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "usable cores": cores,
    }
    if flags:
        for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16"):
            facts[flag] = "yes" if flag in flags else "no"
    return facts


def _cpu_flags() -> set[str]:
    try:
        return set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:  # not Linux: torch's own report below says what it uses
        return set()


def _torch(problems: list[str]) -> dict[str, Any]:
    try:
        import torch
    except Exception as error:  # a broken build raises anything from OSError to RuntimeError
        problems.append(f"torch cannot be imported ({error}); reinstall it")
        return {"import": "failed"}
    from visavis.checkpoints.checkpoint import auto_dtype

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "threads": torch.get_num_threads(),
        "processor level": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "precision auto means": str(auto_dtype("auto", device)).removeprefix("torch."),
    }


def _kernels() -> dict[str, str]:
    """Name the kernels that compute quantized models on the CPU."""
    from visavis.native.library import VARIABLE, find

    library, reason = find()
    if library is not None:
        level = library.vv_level().decode()
        return {"in use": level, "switch": f"{VARIABLE}=0 turns them off, see the documentation"}
    return {
        "in use": f"none: {reason}",
        "cost": "answers of quantised models (GGUF, int8, int4, nano) take about twice as long, "
        "and small ones about twice the memory",
        "remedy": "install GCC or Clang and reinstall visavis: pip install --force-reinstall "
        f"--no-deps visavis; unset {VARIABLE}",
    }


def _cache(problems: list[str]) -> dict[str, Any]:
    from visavis.checkpoints.bundled import cache_dir

    folder = cache_dir()
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name[0] != "."]
    facts: dict[str, Any] = {"folder": folder}
    for path in files:
        if path.suffix != ".verified":
            facts[str(path.relative_to(folder))] = human_bytes(path.stat().st_size)
    if not files:
        facts["contents"] = "empty; `visavis fetch nano` fills it"
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    facts["free disk"] = human_bytes(shutil.disk_usage(existing).free)
    if not os.access(existing, os.W_OK):
        problems.append(f"{existing} cannot be written to; set VISAVIS_CACHE to another folder")
    return facts


def _check_torchvision(problems: list[str]) -> None:
    """Report a torchvision that cannot be imported: it breaks `import transformers`."""
    if importlib.util.find_spec("torchvision") is None:
        return
    command = [sys.executable, "-c", "import torchvision"]
    tried = subprocess.run(command, capture_output=True, text=True)
    if tried.returncode != 0:
        reason = (tried.stderr.strip().splitlines() or ["no message"])[-1]
        problems.append(
            f"torchvision is installed but cannot be imported ({reason}). visavis does not need "
            "it, other packages beside it may fail: pip uninstall torchvision, or install the one "
            "that belongs to your torch"
        )


def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Bundled model.")] = "nano",
    verify: Annotated[
        bool, typer.Option("--verify", help="Recompute the SHA-256 of files already downloaded.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Download the weights of a bundled model into the cache.

    The environment variable VISAVIS_CACHE sets another cache folder.

    [bold]Examples[/bold]

      visavis fetch nano

      visavis fetch nano --verify --json
    """
    from visavis.checkpoints import bundled

    paths = bundled.fetch(name, verify=verify)
    if as_json:
        print_json({part: str(path) for part, path in paths.items()})
        return
    print_columns(
        [
            [part.replace("_", " "), human_bytes(path.stat().st_size), str(path)]
            for part, path in paths.items()
        ]
    )
