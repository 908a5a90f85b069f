"""The training loop: optimizer steps, precision, learning-rate schedule, checkpoints and signals.

An interrupted run is resumed by the same command from its last checkpoint, on the CPU bit for bit.
`checkpoint.py` describes the checkpoint, `distributed.py` how processes share the work.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
from filelock import FileLock, Timeout
from torch import nn

from visavis.errors import TrainError
from visavis.train.checkpoint import Checkpoints, State
from visavis.train.distributed import Processes, TrainModule
from visavis.train.metrics import Meter, flops_per_token, peak_flops, track
from visavis.train.objectives import Part, Task
from visavis.utils import write_atomically

if TYPE_CHECKING:
    from accelerate import Accelerator

SMALLEST_SCALE = 2.0**-10  # of float16 losses; a run that needs less does not train


@dataclass(frozen=True)
class LoopSettings:
    """Numbers of one stage of gradient steps.

    Args:
        learning_rates: peak rate per group of parameters.
        warmup: steps of a rising rate.
        clip: longest gradient of a group of parameters; 0: any length.
        ema: share of the old value in a running mean of the parameters, which is what is kept in
            the end; 0: none.
        save_every: steps between checkpoints; `keep` of them stay.
        log_every: steps between log lines; losses are means since the last one.
        stop_after: end, with a checkpoint, after this step.
        compile: backend of `torch.compile` for the decoder's blocks; empty: none.
    """

    steps: int
    learning_rates: Mapping[str, float]
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    clip: float = 1.0
    ema: float = 0.0
    save_every: int = 50
    keep: int = 1
    log_every: int = 10
    stop_after: int | None = None
    compile: str = ""


@dataclass
class Run:
    """One stage of gradient steps.

    Args:
        groups: parameters that are trained, by name of their rate.
        folder: where its checkpoints lie.
        log: called with each log line.
        rewind: called with the step that the run starts from; log lines after it will come again.
        report: called with each step and a line about it.
        identity: of data and settings; a checkpoint of another one is refused.
    """

    trainee: TrainModule
    task: Task
    groups: Mapping[str, Sequence[nn.Parameter]]
    settings: LoopSettings
    folder: Path
    accelerator: Accelerator
    log: Callable[[dict[str, Any]], None]
    rewind: Callable[[int], None] = lambda step: None
    report: Callable[[int, str], None] = lambda step, text: None
    identity: str = ""
    seed: int = 0


class Stopped(SystemExit):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has been saved; ends the program with the
    exit code that shells expect."""


def train_loop(run: Run) -> None:
    """Take gradient steps until the stage is done, from its last checkpoint if there is one.

    Raises:
        TrainError: a loss or gradient is not finite, the disk is full, or the checkpoint is of
            another stage; the last checkpoint stays as it is.
        Stopped: a signal came; the run was saved after the step it was in.
    """
    settings = run.settings
    with ExitStack() as stack:
        processes = Processes(run.accelerator, run.trainee, run.groups)
        if processes.is_main:
            stack.enter_context(_only_run_in(run.folder))
        seed(f"{run.seed}/{run.folder.name}/{processes.rank}")
        checkpoints = Checkpoints(run.folder, processes, keep=settings.keep, identity=run.identity)
        state = _first_state(run, processes)
        checkpoints.restore(state)
        if processes.is_main:
            run.rewind(state.step)
        track(run.accelerator, run.folder.name, state.step)
        if settings.compile:
            stack.enter_context(_compiled(processes.wrapped, settings.compile))
        processes.wrapped.train()
        stack.callback(run.trainee.eval)
        signals = stack.enter_context(Signals())
        while state.step < settings.steps and state.step != settings.stop_after:
            _take_step(run, processes, state)
            ending = processes.largest(signals.received)
            if ending or state.step % settings.save_every == 0:
                checkpoints.save(state)
            if ending:
                _stop(run, processes, state.step, ending)
        if checkpoints.newest != state.step:
            checkpoints.save(state)
        if state.mean and state.step == settings.steps:
            with torch.no_grad():
                for name, parameter in state.parameters.items():
                    parameter.copy_(state.mean[name])
        processes.finish()


def seed(text: str) -> None:
    """Make random numbers of this process a function of a text."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
    torch.manual_seed(number)
    random.seed(number)


def _first_state(run: Run, processes: Processes) -> State:
    settings, parameters = run.settings, processes.parameters
    optimizer = torch.optim.AdamW(
        [
            {"params": list(own.values()), "peak": settings.learning_rates[name]}
            for name, own in processes.groups.items()
        ],
        betas=settings.betas,
        weight_decay=settings.weight_decay,
    )
    device, kind = run.accelerator.device, run.accelerator.mixed_precision
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}
    decoder = run.trainee.vlm.decoder
    peak = peak_flops(device, mixed.get(kind, decoder.dtype))
    meter = Meter(flops_per_token(decoder), peak and peak * processes.world)
    mean = {}
    if settings.ema:
        mean = {name: p.detach().clone().float() for name, p in parameters.items()}
    return State(parameters, optimizer, run.task, meter, run.accelerator.scaler, mean)


def _take_step(run: Run, processes: Processes, state: State) -> None:
    """Take one step, count and log it."""
    settings, optimizer, scaler = run.settings, state.optimizer, state.scaler
    rate = schedule(state.step, settings)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rate
    try:
        parts = run.task.step(processes.wrapped, processes)
    except torch.OutOfMemoryError as error:
        raise TrainError(
            f"the device's memory did not suffice for step {state.step + 1} ({error}). Lower "
            "micro_tokens or chunk_tokens in the recipe, or set checkpointing to true; the run "
            "resumes from its last checkpoint only with an unchanged recipe, so try a new folder."
        ) from error
    for part in parts:
        if not math.isfinite(part.loss):
            _fail(run, processes, state, parts, f"the {part.name} loss is {part.loss}")
    if scaler is not None:
        scaler.unscale_(optimizer)
    norms = processes.clip(settings.clip)
    if scaler is not None:  # leaves out a step whose gradients overflow, and scales less
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < SMALLEST_SCALE:
            _fail(run, processes, state, parts, "gradients overflow float16 at any scale")
    else:
        for name, norm in norms.items():
            if not math.isfinite(norm):
                _fail(run, processes, state, parts, f"the gradient of {name} is {norm}")
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, mean in state.mean.items():
            mean.lerp_(state.parameters[name].float(), 1 - settings.ema)
    state.step += 1
    state.meter.add(parts)
    if processes.is_main:
        run.report(state.step, state.meter.line())
    if state.step % settings.log_every == 0 or state.step == settings.steps:
        rates = {name: settings.learning_rates[name] * rate for name in norms}
        line = {"step": state.step, "rate": rates, "norm": norms, **state.meter.take()}
        if processes.is_main:
            run.log(line)
            run.accelerator.log(flat(line), step=state.step)


def schedule(step: int, settings: LoopSettings) -> float:
    """Return the share of the peak rate at a step: up in a line, then down as the settings say."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return max(0.0, 1 - done) if settings.schedule == "linear" else 1.0


def flat(line: Mapping[str, Any]) -> dict[str, float]:
    """Return numbers by names with slashes, as trackers take them."""
    numbers: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            numbers |= {f"{name}/{key}": number for key, number in value.items()}
        else:
            numbers[name] = value
    return numbers


def _fail(
    run: Run, processes: Processes, state: State, parts: Sequence[Part], problem: str
) -> None:
    """Stop, leaving the ids of the batch behind."""
    path = run.folder / "failed_batch.json"
    samples = {
        part.name: [id for ids in processes.gathered(part.ids) for id in ids] for part in parts
    }
    if processes.is_main:
        losses = {part.name: str(part.loss) for part in parts}
        content = {"step": state.step + 1, "problem": problem, "loss": losses, "samples": samples}
        with write_atomically(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    raise TrainError(
        f"{problem} at step {state.step + 1}; the learning rate is probably too high, or a sample "
        f"is broken. The step's samples are listed in {path}. The last checkpoint in {run.folder} "
        "is sound; change the recipe's rate or its data, and run it in a new folder."
    )


# ---- what surrounds the steps --------------------------------------------------------------------


class Signals:
    """Notes Ctrl-C and SIGTERM instead of dying of them; a second one takes effect at once."""

    def __init__(self) -> None:
        self.received = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()


def _stop(run: Run, processes: Processes, step: int, number: int) -> None:
    if processes.is_main:
        print(
            f"visavis: stopped by {signal.Signals(number).name} after step {step} of "
            f"{run.settings.steps}, which is saved in {run.folder}; run the same command again to "
            "go on.",
            file=sys.stderr,
        )
    raise Stopped(128 + number)


@contextmanager
def _only_run_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise TrainError(
            f"another process is training in {folder}; wait for it, or use another output folder."
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _compiled(wrapped: nn.Module, backend: str) -> Iterator[None]:
    """Compile the decoder's blocks for the time being; attention, whose loops follow the data,
    stays as it is."""
    blocks = [block for name, block in wrapped.named_modules() if is_block(name)]
    for block in blocks:
        block.attend = torch.compiler.disable(block.attend)
        block.forward = torch.compile(block.forward, backend=backend, dynamic=True)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward, block.attend


def is_block(name: str) -> bool:
    """Return whether a module's name is of a block of the decoder."""
    before, _, number = name.rpartition(".")
    return before.endswith("decoder.blocks") and number.isdigit()
