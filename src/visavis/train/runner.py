"""A whole training run: load the model, run the stages in order, export. Resumable at every point.

out/recipe.json           the recipe of this run; another recipe is refused
out/features/…            the vision tower's cached output, if the recipe asks for it
out/<stage>/step-….pt     checkpoints of a stage of gradient steps
out/<stage>.safetensors   weights that a closed-form stage fitted
out/log.jsonl             one line per log interval, over all stages
out/trained.json          what each stage trains, part by part
out/samples.json          predictions on a few samples after each stage
out/report.html           a report of all of that
out/model/                the folder `visavis.load` reads, updated after each stage
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from visavis.checkpoints.checkpoint import Checkpoint, has_bf16_instructions
from visavis.checkpoints.compose import compose, tiled
from visavis.checkpoints.load import embed_as, load_checkpoint
from visavis.checkpoints.quantize import unpack_linears
from visavis.data.examples import Sample
from visavis.data.sampler import SourceSampler, SourceShare
from visavis.data.sources import source_fingerprint
from visavis.errors import TrainError
from visavis.train.closed_form_stages import make_class_features, run_frozen_stage
from visavis.train.context import Report, TrainingRun
from visavis.train.data_loader import DataLoader
from visavis.train.distributed import TrainModule
from visavis.train.export import save_model
from visavis.train.feature_store import FeatureStore
from visavis.train.loop import LoopSettings, train_loop
from visavis.train.loop import Run as LoopRun
from visavis.train.lora import add_lora
from visavis.train.losses import Contrast
from visavis.train.metrics import RunLog, choose_trackers
from visavis.train.objectives import Task
from visavis.train.objectives.contrastive import ContrastiveTask, JointTask
from visavis.train.objectives.generative import GenerativeTask
from visavis.train.param_groups import trainable_groups, trainable_table
from visavis.train.recipe import (
    Contrastive,
    DrawnFrom,
    Generative,
    ModelRecipe,
    Recipe,
    StepsStage,
    sources_of,
    trains_whole,
)
from visavis.train.report import predict, write_report
from visavis.utils import write_atomically

PRECISIONS = {"f32": "no", "bf16": "bf16", "f16": "fp16"}  # the recipe's and accelerate's names


def run_recipe(
    recipe: Recipe, data: Path, out: Path, *, report: Report = lambda *words: None
) -> Path:
    """Train everything a recipe names; return the folder of the finished model.

    Args:
        data: the folder that sources' paths start at.
        out: where the run lives; an unfinished run there is resumed.

    Raises:
        TrainError: data is missing, or `out` holds a run of another recipe.
    """
    run = start(recipe, data, out, report)
    make_class_features(run)
    for stage in recipe.stages:
        if isinstance(stage, StepsStage):
            run_steps(run, stage)
        else:
            run_frozen_stage(run, stage)
        if run.accelerator.is_main_process:
            problems = save_model(run.loaded, recipe, out / "model")
            log = RunLog(out / "log.jsonl", stage.name)
            log({"saved": "model", "problems": problems})
            write_report(out)
        run.accelerator.wait_for_everyone()
    return out / "model"


def start(recipe: Recipe, data: Path, out: Path, report: Report) -> TrainingRun:
    """Load or compose the model, with adapters that do nothing yet."""
    from accelerate import Accelerator

    _claim(recipe, out)
    cpu = not torch.cuda.is_available()
    if cpu and recipe.precision == "f16":
        raise TrainError(
            "float16 is trained on GPUs only, and there is none; set precision to bf16 or f32."
        )
    mixed = "no"
    if trains_whole(recipe) or recipe.precision == "f16":  # whose gradients need scaling
        mixed = PRECISIONS[recipe.precision]
    trackers, note = choose_trackers(recipe.trackers, asked="trackers" in recipe.model_fields_set)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=mixed,
        log_with=trackers or None,
        project_dir=str(out / "curves"),
    )
    if note and accelerator.is_main_process:
        print(f"visavis: {note}", file=sys.stderr)
    # What is trained whole stays float32 and computes in the recipe's precision.
    precision = "f32" if trains_whole(recipe) else recipe.precision
    device = str(accelerator.device)
    loaded = open_model(recipe.model, precision=precision, device=device, seed=recipe.seed)
    if not loaded.vlm.config.has_decoder:
        raise TrainError(
            f"{loaded.name} only embeds and has no language model; recipes train models with one. "
            "Train it with sentence-transformers, and load the result here."
        )
    if recipe.model.quantize:
        from visavis.train.lora import quantize_decoder

        quantize_decoder(loaded.vlm.decoder, recipe.model.quantize)
    if recipe.model.lora is not None:
        torch.manual_seed(recipe.seed + 1)
        add_lora(loaded.vlm.decoder, recipe.model.lora)
    encoder = loaded.encoder
    features = None
    if recipe.feature_cache and loaded.processor is not None:
        half = cpu and recipe.precision == "bf16" and has_bf16_instructions()
        features = FeatureStore(out / "features", loaded.vlm, loaded.processor, half=half)
    return TrainingRun(recipe, data, out, loaded, encoder, accelerator, features, report)


def open_model(model: ModelRecipe, *, precision: str, device: str, seed: int) -> Checkpoint:
    """Return the model that a recipe starts from."""
    if model.base:
        loaded = load_checkpoint(
            model.base,
            precision=precision,
            device=device,
            chat_template=model.chat_template,
            profile=model.profile,
        )
    else:
        loaded = compose(model.composition(), precision=precision, device=device, seed=seed)
        if model.profile:
            embed_as(loaded, model.profile)
    if model.base and model.canvases and loaded.processor is not None:
        loaded.processor = tiled(loaded.processor, model.canvases)
    unpack_linears(loaded.vlm.decoder)
    return loaded


def _claim(recipe: Recipe, out: Path) -> None:
    """Write the recipe into its folder, or see that it is the one that runs there.

    Raises:
        TrainError: another recipe runs there.
    """
    path, text = out / "recipe.json", recipe.model_dump_json(indent=1)
    out.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        with write_atomically(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    elif path.read_text(encoding="utf-8") != text:
        raise TrainError(
            f"{out} holds the run of another recipe ({path} differs from this one); choose another "
            "folder with --output, or delete that one to start over."
        )


# ---- stages of gradient steps --------------------------------------------------------------------


def run_steps(run: TrainingRun, stage: StepsStage) -> None:
    """Take the stage's gradient steps."""
    vlm = run.loaded.vlm
    task, steps = build_task(run, stage)
    groups = trainable_groups(vlm, stage)
    rates: dict[str, float] = dict(stage.train.items())
    scales = [one.log_scale for one in _contrastive(task) if one.log_scale.requires_grad]
    if scales:
        groups["temperature"], rates["temperature"] = scales, max(rates.values())
    _write_table(run, stage, groups, rates)
    vlm.decoder.recompute = stage.checkpointing
    warmup = stage.warmup if stage.warmup >= 1 else stage.warmup * steps
    log = RunLog(run.out / "log.jsonl", stage.name)
    train_loop(
        LoopRun(
            TrainModule(vlm),
            task,
            groups,
            LoopSettings(
                steps=steps,
                learning_rates=rates,
                weight_decay=stage.weight_decay,
                betas=stage.betas,
                warmup=math.ceil(warmup),
                schedule=stage.schedule,
                clip=stage.clip,
                ema=stage.ema,
                save_every=stage.save_every,
                keep=stage.keep,
                log_every=stage.log_every,
                compile="inductor" if stage.compile else "",
            ),
            run.out / stage.name,
            run.accelerator,
            log=log,
            rewind=log.rewind,
            report=lambda step, text: run.report(stage.name, step, steps, text),
            identity=identity(run, stage),
            seed=run.recipe.seed,
        )
    )
    vlm.requires_grad_(False).eval()
    vlm.decoder.recompute = False
    if run.accelerator.is_main_process:
        _add(run.out / "samples.json", stage.name, lambda: predict(run.loaded, task))


def build_task(run: TrainingRun, stage: StepsStage) -> tuple[Task, int]:
    """Return the objective a stage describes, and how many steps it takes."""
    parts: list[Task] = []
    steps = []
    if stage.generative is not None:
        chat = stage.generative
        sources, sampler = _sampler(run, stage, chat)
        loader = _loader(run, stage, chat, cut=chat.cut)
        parts.append(
            GenerativeTask(
                sources,
                sampler,
                loader,
                batch=chat.batch,
                micro_tokens=chat.micro_tokens,
                weight=chat.weight,
            )
        )
        steps.append(sampler.size / chat.batch)
    if stage.contrastive is not None:
        match = stage.contrastive
        sources, sampler = _sampler(run, stage, match)
        if sampler.size < match.batch:
            raise TrainError(
                f"stage {stage.name!r} draws {match.batch} queries a step of {sampler.size} "
                "samples, so that each batch would hold some twice; lower `batch`, or add data."
            )
        parts.append(
            ContrastiveTask(
                sources,
                sampler,
                _loader(run, stage, match),
                Contrast(
                    symmetric=match.symmetric,
                    alpha=match.alpha,
                    margin=match.margin,
                    ratio=match.ratio,
                    dims=match.dims,
                ),
                batch=match.batch,
                chunk_tokens=match.chunk_tokens,
                scale=1 / match.temperature,
                learned_scale=match.learned_temperature,
                negatives=match.negatives,
                pooling=run.loaded.profile.pooling,
                weight=match.weight,
            )
        )
        steps.append(sampler.size / match.batch)
    total = stage.steps or math.ceil((stage.epochs or 0) * max(steps))
    return (parts[0] if len(parts) == 1 else JointTask(parts)), total


def _sampler(
    run: TrainingRun, stage: StepsStage, part: Generative | Contrastive
) -> tuple[dict[str, Sequence[Sample]], SourceSampler]:
    sources = {name: run.source(name) for name in part.sources}

    def share(name: str, drawn: DrawnFrom) -> SourceShare:
        return SourceShare(len(sources[name]), drawn.weight, drawn.block)

    shares = {name: share(name, drawn) for name, drawn in part.sources.items()}
    return sources, SourceSampler(shares, seed=run.recipe.seed + sum(map(ord, stage.name)))


def _loader(
    run: TrainingRun, stage: StepsStage, part: Generative | Contrastive, *, cut: bool = False
) -> DataLoader:
    encoder = run.encoder
    if stage.chat_template:
        encoder = replace(
            encoder, profile=replace(encoder.profile, chat_template=stage.chat_template)
        )
    return DataLoader(
        encoder,
        run.accelerator.device,
        features=run.features,
        max_tokens=part.max_tokens,
        cut=cut,
    )


def _contrastive(task: Task) -> list[ContrastiveTask]:
    parts = task.parts if isinstance(task, JointTask) else [task]
    return [part for part in parts if isinstance(part, ContrastiveTask)]


def identity(run: TrainingRun, stage: StepsStage) -> str:
    """Return a digest of recipe and data that identifies the checkpoints of a stage."""
    digest = hashlib.sha256(run.recipe.model_dump_json().encode())
    for name in sources_of(stage):
        digest.update(source_fingerprint(run.recipe.data[name], run.data).encode())
    return digest.hexdigest()[:16]


def _write_table(run: TrainingRun, stage: StepsStage, groups: dict[str, Any], rates: Any) -> None:
    """Add what a stage trains to `trained.json`."""
    if run.accelerator.is_main_process:
        table = trainable_table(run.loaded.vlm, groups, rates)
        _add(run.out / "trained.json", stage.name, lambda: table)


def _add(path: Path, name: str, make: Callable[[], Any]) -> None:
    """Add a stage's entry to a JSON file, unless it has one."""
    entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if name not in entries:
        entries[name] = make()
        with write_atomically(path) as temporary:
            temporary.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
