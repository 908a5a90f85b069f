"""A whole run: base weights, stages in order, the finished folder. Resumable at every point.

    out/features/…            tower features, kept for other runs
    out/<stage>.pt            a stage of steps, while and after it runs
    out/<stage>.safetensors   what a pair stage found
    out/log.jsonl             one line per log interval, over all stages
    out/model/                the folder `visavis.load` reads, renewed after each stage

Knows the kinds of stages; objectives, loop and layouts are elsewhere.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visavis.checkpoints import bundled
from visavis.checkpoints.efficientnet import load_efficientnet
from visavis.checkpoints.gguf import decoder as gguf_decoder
from visavis.checkpoints.gguf.reader import GGUFFile, open_gguf
from visavis.checkpoints.loaded import auto_dtype
from visavis.checkpoints.native import save_native
from visavis.data.records import Record
from visavis.data.sources import load_source
from visavis.model.config import ConnectorConfig, EfficientNetConfig, HeadConfig, VLMConfig
from visavis.model.vlm import VLM
from visavis.processing.images import ImageProcessorConfig
from visavis.processing.profile import PromptProfile
from visavis.processing.tokenizer import build_tokenizer, special_tokens
from visavis.train.classes import class_grids, class_shifts
from visavis.train.examples import Encoder, Example, chat_pairs
from visavis.train.features import TowerFeatures
from visavis.train.freeze import trainable_groups
from visavis.train.frozen import run_frozen_stage
from visavis.train.loop import LoopSettings, train_loop
from visavis.train.lora import add_lora
from visavis.train.recipe import Generative, LoopStage, Recipe, sources_of
from visavis.train.tasks import Task
from visavis.train.tasks.contrastive import ContrastiveTask, Matched
from visavis.train.tasks.generative import GenerativeTask
from visavis.train.tasks.joint import JointTask

CLASSES = "imagenet-classes"
UNMIRRORED = frozenset({"vqa-rad", "nlvr", "easy-vqa"})  # left and right matter, or cost too much

Report = Callable[[str, int, int, str], None]  # stage, done, total, a line


@dataclass
class Run:
    """The parts that every stage works on."""

    recipe: Recipe
    data: Path
    out: Path
    vlm: VLM
    encoder: Encoder
    processor: ImageProcessorConfig
    features: TowerFeatures
    report: Report
    records: dict[str, list[Record]] = field(default_factory=dict)

    def source(self, name: str) -> list[Record]:
        """Return a source's records, read once."""
        if name not in self.records:
            self.records[name] = load_source(name, self.data)
        return self.records[name]

    def rows(self, name: str, *, flip: bool = False) -> list[int]:
        """Return the feature rows of a source's pictures (of class names: made features)."""
        if name == CLASSES:
            return class_rows(self, variant=int(flip))
        images = [record.image for record in self.source(name)]
        done = 0

        def tell(count: int) -> None:
            nonlocal done
            done += count
            self.report(f"features of {name}", done, len(images), "")

        return self.features.add(images, flip=flip, report=tell)

    def views(self, name: str, *, flip: bool) -> list[tuple[int, ...]]:
        """Return the rows of each picture: plain, and mirrored where that is allowed."""
        views = [self.rows(name)]
        if flip and name not in UNMIRRORED:
            views.append(self.rows(name, flip=True))
        return list(zip(*views, strict=True))

    def matched(self, name: str, *, flip: bool) -> list[Matched]:
        """Return the records that have a caption; those of one caption are one group."""
        return [
            Matched(record, rows, group=record.label or record.caption.lower())
            for record, rows in zip(self.source(name), self.views(name, flip=flip), strict=True)
            if record.caption
        ]

    def log(self, line: dict[str, Any]) -> None:
        """Append one line to the log."""
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def run_recipe(
    recipe: Recipe, data: Path, out: Path, *, report: Report = lambda *words: None
) -> Path:
    """Train everything a recipe names; return the folder of the finished model.

    Args:
        data: the folder of data sets.
        out: where the run lives; an unfinished run there goes on.

    Raises:
        TrainError: data is missing, or `out` holds a run of another recipe.
    """
    out.mkdir(parents=True, exist_ok=True)
    run = start(recipe, data, out, report)
    for stage in recipe.stages:
        if isinstance(stage, LoopStage):
            run_loop_stage(run, stage)
        else:
            run_frozen_stage(run, stage)
        save_model(run)
    return out / "model"


def start(recipe: Recipe, data: Path, out: Path, report: Report) -> Run:
    """Build the model on its base weights, with adapters that do nothing yet."""
    base = bundled.fetch(recipe.bundle)
    gguf = open_gguf(base["language_model"])
    tokenizer, specials = build_tokenizer(gguf.metadata), special_tokens(gguf.metadata)
    config = model_config(recipe, gguf)
    torch.manual_seed(recipe.seed)
    vlm = VLM(config)
    tower, _ = load_efficientnet(base["vision_tower"])
    state = {f"tower.{name}": tensor for name, tensor in tower.items()}
    for name, array in gguf_decoder.decoder_state(gguf):
        state[name] = torch.from_numpy(array)
    state["decoder.head.weight"] = state["decoder.embed.weight"]
    missing, unexpected = vlm.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all(name.startswith(("connector.", "head.")) for name in missing), missing
    vlm.cast(auto_dtype("auto", "cpu"))
    add_lora(vlm.decoder, rank=recipe.lora.rank, scale=recipe.lora.scale)
    processor = tower_processor(recipe.image_size)
    encoder = Encoder(
        tokenizer, specials, recipe.turns, config.image_token_id, config.tokens_per_image
    )
    features = TowerFeatures(out / "features", vlm, processor)
    return Run(recipe, data, out, vlm, encoder, processor, features, report)


def model_config(recipe: Recipe, gguf: GGUFFile) -> VLMConfig:
    """Return the whole model's config: the base's decoder, the recipe's connector and head."""
    decoder = gguf_decoder.decoder_config(gguf)
    tower = EfficientNetConfig(variant=2, image_size=recipe.image_size)
    specials = special_tokens(gguf.metadata)
    return VLMConfig(
        decoder=decoder,
        tower=tower,
        connector=ConnectorConfig(
            in_width=tower.width, out_width=decoder.width, **recipe.connector.model_dump()
        ),
        head=HeadConfig(
            layers=recipe.head.layers,
            dim=recipe.head.dim,
            tower_width=tower.width,
        ),
        image_token_id=specials.pad_id if specials.pad_id is not None else 0,
    )


def tower_processor(size: int) -> ImageProcessorConfig:
    """Return the sizing of EfficientNet-Lite: squashed, bicubic, (pixel - 127) / 128."""
    return ImageProcessorConfig(
        size=size, resize="squash", mean=(127 / 255,) * 3, std=(128 / 255,) * 3, resample="bicubic"
    )


def class_rows(run: Run, variant: int) -> list[int]:
    """Return rows of features made for each class name, over pictures of the recipe's sources."""
    keys = [f"{record.key}-{variant}" for record in run.source(CLASSES)]
    if any(key not in run.features.rows for key in keys):
        named = dict.fromkeys(name for stage in run.recipe.stages for name in sources_of(stage))
        pictures = [row for name in named if name != CLASSES for row in run.rows(name)]
        _, classifier = load_efficientnet(bundled.fetch(run.recipe.bundle)["vision_tower"])
        means = run.features.means(pictures)
        generator = torch.Generator().manual_seed(run.recipe.seed + variant)
        chosen = torch.randint(len(pictures), (len(keys),), generator=generator).tolist()
        grids = class_grids(
            class_shifts(classifier, means),
            run.features[[pictures[number] for number in chosen]],
            means.mean(0),
            generator,
        )
        run.features.put(keys, grids.half().numpy())
    return [run.features.rows[key] for key in keys]


# ---- stages of gradient steps ----------------------------------------------------------------


def run_loop_stage(run: Run, stage: LoopStage) -> None:
    """Take the stage's gradient steps."""
    rates: dict[str, float] = {
        part: stage.learning_rate if part == "lora" else stage.connector_learning_rate
        for part in stage.trainable
    }
    train_loop(
        run.vlm,
        build_task(run, stage),
        trainable_groups(run.vlm, stage.trainable, lora_from=stage.lora_from),
        LoopSettings(
            steps=stage.steps,
            learning_rates=rates,
            weight_decay=stage.weight_decay,
            warmup_steps=stage.warmup_steps,
        ),
        checkpoint=run.out / f"{stage.name}.pt",
        log=lambda line: run.log({"stage": stage.name, **line}),
        report=lambda step, text: run.report(stage.name, step, stage.steps, text),
    )
    run.vlm.requires_grad_(False)


def build_task(run: Run, stage: LoopStage) -> Task:
    """Return the objective a stage describes."""
    parts: list[Task] = []
    seed = run.recipe.seed + sum(map(ord, stage.name))
    if stage.generative is not None:
        chat = stage.generative
        pools = {name: _examples(run, name, chat, stage.flip) for name in chat.sources}
        parts.append(
            GenerativeTask(
                pools, chat.sources, run.features, tokens=chat.tokens, weight=chat.weight, seed=seed
            )
        )
    if stage.contrastive is not None:
        match = stage.contrastive
        matched = {name: run.matched(name, flip=stage.flip) for name in match.sources}
        parts.append(
            ContrastiveTask(
                matched, match.sources, run.features, run.encoder, settings=match, seed=seed + 7
            )
        )
    return parts[0] if len(parts) == 1 else JointTask(parts)


def _examples(run: Run, name: str, chat: Generative, flip: bool) -> list[list[Example]]:
    draw = random.Random(run.recipe.seed)
    examples = []
    for record, rows in zip(run.source(name), run.views(name, flip=flip), strict=True):
        for pairs in chat_pairs(
            record,
            draw,
            questions_per_example=chat.questions_per_example,
            max_caption_words=chat.max_caption_words,
        ):
            encoded = run.encoder.conversation(pairs)
            examples.append([Example(encoded, row) for row in rows])
    return examples


# ---- the finished folder -----------------------------------------------------------------------


def adapter_tensors(vlm: VLM) -> dict[str, Tensor]:
    """Return what was trained, float16: connector, head, LoRA pairs."""
    tensors = {}
    for name, tensor in vlm.state_dict().items():
        if name.startswith(("connector.", "head.")) or ".lora_" in name:
            tensors[name] = tensor.half()
    return tensors


def save_model(run: Run) -> None:
    """Write the folder that `visavis.load` reads."""
    save_native(
        run.out / "model",
        name=run.recipe.name,
        config=run.vlm.config,
        tensors=adapter_tensors(run.vlm),
        profile=PromptProfile(turns=run.recipe.turns, pooling="head"),
        processor=run.processor,
        bundle=run.recipe.bundle,
        lora_scale=run.recipe.lora.scale,
        file_name="adapter.safetensors",
    )
