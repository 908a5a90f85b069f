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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from visavis.checkpoints import bundled, gguf_llama
from visavis.checkpoints.efficientnet import load_efficientnet
from visavis.checkpoints.gguf import GGUFFile, open_gguf
from visavis.checkpoints.loaded import auto_dtype
from visavis.checkpoints.native import save_native
from visavis.data.records import Record
from visavis.data.sources import load_source
from visavis.files import write_atomically
from visavis.model.config import ConnectorConfig, EfficientNetConfig, HeadConfig, VLMConfig
from visavis.model.head import mean_per_sequence
from visavis.model.vlm import VLM
from visavis.processing.images import ImageProcessorConfig
from visavis.processing.pack import batches, pack
from visavis.processing.profile import PromptProfile
from visavis.processing.tokenizer import build_tokenizer, special_tokens
from visavis.train.examples import Encoder, Example, chat_pairs
from visavis.train.features import TowerFeatures
from visavis.train.freeze import trainable_groups
from visavis.train.loop import LoopSettings, train_loop
from visavis.train.lora import add_lora
from visavis.train.pair import Pair, PairSettings, fit_pair, stack_pairs
from visavis.train.recipe import Generative, LoopStage, PairStage, Recipe
from visavis.train.tasks import Task
from visavis.train.tasks.contrastive import ContrastiveTask, Matched
from visavis.train.tasks.generative import GenerativeTask
from visavis.train.tasks.joint import JointTask

EMBED_BATCH_TOKENS = 2048
PAIR_TEXT_TOKENS = 256
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
        """Return the feature rows of a source's pictures."""
        images = [record.image for record in self.source(name)]
        done = 0

        def tell(count: int) -> None:
            nonlocal done
            done += count
            self.report(f"features of {name}", done, len(images), "")

        return self.features.add(images, flip=flip, report=tell)

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
        if isinstance(stage, PairStage):
            run_pair_stage(run, stage)
        else:
            run_loop_stage(run, stage)
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
    for name, array in gguf_llama.decoder_state(gguf):
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
    decoder = gguf_llama.decoder_config(gguf)
    tower = EfficientNetConfig(variant=2, image_size=recipe.image_size)
    specials = special_tokens(gguf.metadata)
    return VLMConfig(
        decoder=decoder,
        tower=tower,
        connector=ConnectorConfig(
            in_width=tower.width, out_width=decoder.width, **recipe.connector.model_dump()
        ),
        head=HeadConfig(layers=recipe.head.layers, dim=recipe.head.dim),
        image_token_id=specials.pad_id if specials.pad_id is not None else 0,
    )


def tower_processor(size: int) -> ImageProcessorConfig:
    """Return the sizing of EfficientNet-Lite: squashed, bicubic, (pixel - 127) / 128."""
    return ImageProcessorConfig(
        size=size, resize="squash", mean=(127 / 255,) * 3, std=(128 / 255,) * 3, resample="bicubic"
    )


# ---- stages of gradient steps ----------------------------------------------------------------


def run_loop_stage(run: Run, stage: LoopStage) -> None:
    """Take the stage's gradient steps."""
    rates = {
        part: stage.learning_rate if part == "lora" else stage.connector_learning_rate
        for part in stage.trainable
    }
    train_loop(
        run.vlm,
        build_task(run, stage),
        trainable_groups(run.vlm, stage.trainable),
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
        matched = {name: _matched(run, name, stage.flip) for name in match.sources}
        parts.append(
            ContrastiveTask(
                matched, match.sources, run.features, run.encoder, settings=match, seed=seed + 7
            )
        )
    return parts[0] if len(parts) == 1 else JointTask(parts)


def _views(run: Run, name: str, flip: bool) -> list[tuple[int, ...]]:
    """Return the feature rows of each picture: plain, and mirrored where that is allowed."""
    views = [run.rows(name)]
    if flip and name not in UNMIRRORED:
        views.append(run.rows(name, flip=True))
    return list(zip(*views, strict=True))


def _examples(run: Run, name: str, chat: Generative, flip: bool) -> list[list[Example]]:
    draw = random.Random(run.recipe.seed)
    examples = []
    for record, rows in zip(run.source(name), _views(run, name, flip), strict=True):
        for pairs in chat_pairs(
            record,
            draw,
            questions_per_example=chat.questions_per_example,
            max_caption_words=chat.max_caption_words,
        ):
            encoded = run.encoder.conversation(pairs)
            examples.append([Example(encoded, row) for row in rows])
    return examples


def _matched(run: Run, name: str, flip: bool) -> list[Matched]:
    """Return the records that have a text; those of one text are one group."""
    return [
        Matched(record, rows, group=record.label or record.caption.lower())
        for record, rows in zip(run.source(name), _views(run, name, flip), strict=True)
        if record.caption
    ]


# ---- stages on frozen vectors ------------------------------------------------------------------


def run_pair_stage(run: Run, stage: PairStage) -> None:
    """Fit linear layers on frozen vectors and put them into the connector or the head."""
    path = run.out / f"{stage.name}.safetensors"
    if path.is_file():
        pair = Pair(**load_file(path))
    else:
        pair = _fit(run, stage)
        with write_atomically(path) as temporary:
            save_file({key: value.contiguous() for key, value in vars(pair).items()}, temporary)
    if stage.kind == "align":
        start_connector(run.vlm, pair)
    else:
        assert run.vlm.head is not None
        with torch.no_grad():
            run.vlm.head.image.weight.copy_(pair.image_weight)
            run.vlm.head.image.bias.copy_(pair.image_bias)
            run.vlm.head.text.weight.copy_(pair.text_weight)
            run.vlm.head.text.bias.copy_(pair.text_bias)


def _fit(run: Run, stage: PairStage) -> Pair:
    matched = [one for name in stage.sources for one in _matched(run, name, stage.flip)]
    views = max(len(one.rows) for one in matched)
    rows = [[one.rows[view % len(one.rows)] for one in matched] for view in range(views)]
    if stage.kind == "align":
        images = torch.stack([run.features.means(view) for view in rows])
        assert run.vlm.config.connector is not None
        dim = run.vlm.config.connector.out_width
    else:
        images = torch.stack([picture_states(run, view) for view in rows])
        dim = run.recipe.head.dim
    texts = [[one.record.caption for one in matched]]
    texts.append([one.record.also[0] if one.record.also else one.record.caption for one in matched])
    states = torch.stack([text_states(run, column) for column in texts])
    names = {group: number for number, group in enumerate({one.group for one in matched})}
    groups = torch.tensor([names[one.group] for one in matched])
    pairs = [
        fit_pair(
            images,
            states,
            PairSettings(
                dim=dim // stage.members,
                epochs=stage.epochs,
                batch=stage.batch,
                learning_rate=stage.learning_rate,
                dropout=stage.dropout,
                logit_scale=stage.logit_scale,
                alpha=stage.alpha,
                seed=run.recipe.seed + member,
            ),
            groups=groups,
        )
        for member in range(stage.members)
    ]
    stacked = stack_pairs(pairs)
    if stage.kind == "head":
        return stacked
    return as_tokens(stacked, images, run.vlm.decoder.embed.weight)


def as_tokens(pair: Pair, images: Tensor, embeddings: Tensor) -> Pair:
    """Return the pair with its image side shifted and scaled to the spread of token embeddings:
    the decoder then meets image tokens it is used to in size.

    Args:
        images: mean features the pair was fitted on, [..., W].
        embeddings: the decoder's token embeddings [vocab, D].
    """
    tokens = F.linear(images.flatten(0, -2), pair.image_weight, pair.image_bias)
    scale = embeddings.float().std() / tokens.std(0).mean()
    return replace(
        pair,
        image_weight=scale * pair.image_weight,
        image_bias=scale * (pair.image_bias - tokens.mean(0)),
    )


@torch.no_grad()
def start_connector(vlm: VLM, pair: Pair) -> None:
    """Make the mean image token of a linear connector the pair's vector of the mean feature."""
    assert vlm.connector is not None
    layer = vlm.connector.layers[0]
    folds = vlm.connector.config.shuffle**2
    layer.weight.copy_((pair.image_weight / folds).repeat(1, folds))
    layer.bias.copy_(pair.image_bias)


@torch.inference_mode()
def text_states(run: Run, texts: list[str]) -> Tensor:
    """Return mean hidden states at the head's layers, [N, layers * D]."""
    encoded = [run.encoder.text(text, PAIR_TEXT_TOKENS) for text in texts]
    layers = run.recipe.head.layers
    states = torch.empty(len(texts), len(layers) * run.vlm.config.decoder.width)
    lengths = [len(one.token_ids) for one in encoded]
    done = 0
    for group in batches(lengths, EMBED_BATCH_TOKENS):
        batch = pack([encoded[i] for i in group])
        found = run.vlm(batch, layers)
        hidden = torch.cat([found[layer] for layer in layers], -1)
        everything = torch.ones(batch.num_tokens, dtype=torch.bool)
        states[group] = mean_per_sequence(hidden, batch.lengths, everything)[0]
        done += len(group)
        run.report("text states", done, len(texts), "")
    return states


@torch.inference_mode()
def picture_states(run: Run, rows: list[int]) -> Tensor:
    """Return mean hidden states of pictures alone at the head's layers, [N, layers * D]."""
    layers = run.recipe.head.layers
    per_batch = max(1, EMBED_BATCH_TOKENS // run.encoder.tokens_per_image)
    states = []
    for start_row in range(0, len(rows), per_batch):
        chunk = rows[start_row : start_row + per_batch]
        batch = pack([run.encoder.picture()] * len(chunk))
        batch.features = run.features[chunk]
        found = run.vlm(batch, layers)
        hidden = torch.cat([found[layer] for layer in layers], -1)
        everything = torch.ones(batch.num_tokens, dtype=torch.bool)
        states.append(mean_per_sequence(hidden, batch.lengths, everything)[0])
        run.report("picture states", start_row + len(chunk), len(rows), "")
    return torch.cat(states)


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
