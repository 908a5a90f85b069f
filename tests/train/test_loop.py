"""The loop: a killed run goes on bit for bit, both objectives learn, bad runs stop."""

from __future__ import annotations

import copy
import io
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.fakes import tiny_model
from visavis.data.records import Record
from visavis.errors import TrainError
from visavis.model.vlm import VLM
from visavis.train.examples import Encoder, Example, chat_pairs
from visavis.train.features import TowerFeatures
from visavis.train.freeze import trainable_groups
from visavis.train.loop import LoopSettings, train_loop
from visavis.train.lora import add_lora
from visavis.train.recipe import Contrastive
from visavis.train.tasks.contrastive import ContrastiveTask, Matched
from visavis.train.tasks.generative import GenerativeTask
from visavis.train.tasks.joint import JointTask

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}


def drawn_records() -> list[Record]:
    """Plain pictures of one colour each, with a question and a caption about it."""
    records = []
    for number in range(12):
        name, colour = list(COLOURS.items())[number % 3]
        shade = tuple(min(255, value + number) for value in colour)
        file = io.BytesIO()
        Image.new("RGB", (16, 16), shade).save(file, "PNG")
        pair = ("colour?", name)
        records.append(Record(str(number), file.getvalue(), caption=name, questions=(pair,)))
    return records


def make_parts(folder: Path, seed: int = 0) -> tuple[VLM, JointTask]:
    model = tiny_model()
    vlm = copy.deepcopy(model.vlm)
    torch.manual_seed(seed)
    add_lora(vlm.decoder, rank=4, scale=2.0)
    config = vlm.config
    encoder = Encoder(
        model.tokenizer,
        model.specials,
        "chatml-bare",
        config.image_token_id,
        config.tokens_per_image,
    )
    assert model.processor is not None
    features = TowerFeatures(folder / "features", vlm, model.processor)
    records = drawn_records()
    rows = features.add([record.image for record in records])
    examples = [
        [Example(encoder.conversation(pairs), row)]
        for record, row in zip(records, rows, strict=True)
        for pairs in chat_pairs(
            record, random.Random(0), questions_per_example=2, max_caption_words=8
        )[:1]
    ]
    chat = GenerativeTask(
        {"made": examples}, {"made": 1.0}, features, tokens=200, weight=1.0, seed=1
    )
    matched = [
        Matched(record, (row,), record.caption) for record, row in zip(records, rows, strict=True)
    ]
    match = ContrastiveTask(
        {"made": matched},
        {"made": 1.0},
        features,
        encoder,
        settings=Contrastive(pairs=6, sources={"easy-vqa": 1.0}, max_text_tokens=16),
        seed=2,
    )
    return vlm, JointTask([chat, match])


def train(folder: Path, steps: int, stop_after: int | None = None) -> tuple[VLM, list[dict]]:
    vlm, task = make_parts(folder)
    lines: list[dict[str, Any]] = []
    train_loop(
        vlm,
        task,
        trainable_groups(vlm, ("connector", "lora", "head")),
        LoopSettings(
            steps=steps,
            learning_rates={"connector": 1e-2, "lora": 1e-2, "head": 1e-2},
            warmup_steps=2,
            save_every=2,
            log_every=1,
            stop_after=stop_after,
        ),
        checkpoint=folder / "stage.pt",
        log=lines.append,
    )
    return vlm, lines


def test_resumed_run_equals_an_unbroken_one(tmp_path: Path) -> None:
    whole, lines = train(tmp_path / "whole", 6)
    broken = tmp_path / "broken"
    _, before = train(broken, 6, stop_after=3)
    resumed, after = train(broken, 6)
    assert [line["step"] for line in before + after] == [1, 2, 3, 4, 5, 6]
    for name in ("generative", "contrastive", "norm"):
        assert [line[name] for line in before + after] == [line[name] for line in lines]
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_both_objectives_are_learned_on_one_set_of_weights(tmp_path: Path) -> None:
    vlm, lines = train(tmp_path, 120)
    assert lines[-1]["generative"] < 0.6 * lines[0]["generative"]
    assert lines[-1]["contrastive"] < 0.5 * lines[0]["contrastive"]
    assert not any(p.requires_grad for p in vlm.tower.parameters())  # type: ignore[union-attr]


def test_checkpoint_of_another_stage_is_refused(tmp_path: Path) -> None:
    train(tmp_path, 2)
    vlm, task = make_parts(tmp_path)
    with pytest.raises(TrainError, match="do not fit"):
        train_loop(
            vlm,
            task,
            trainable_groups(vlm, ("connector",)),
            LoopSettings(steps=3, learning_rates={"connector": 1e-3}),
            checkpoint=tmp_path / "stage.pt",
            log=lambda line: None,
        )


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    vlm, task = make_parts(tmp_path)
    with torch.no_grad():
        vlm.decoder.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainError, match="loss is nan at step 0"):
        train_loop(
            vlm,
            task,
            trainable_groups(vlm, ("lora",)),
            LoopSettings(steps=3, learning_rates={"lora": 1e-3}),
            checkpoint=tmp_path / "stage.pt",
            log=lambda line: None,
        )


def test_blocks_below_lora_from_keep_their_states(tmp_path: Path) -> None:
    """What the embedding head reads below stays the same while later blocks learn."""
    vlm, _ = make_parts(tmp_path)
    groups = trainable_groups(vlm, ("lora",), lora_from=1)
    names = [name for name, p in vlm.named_parameters() if p.requires_grad]
    assert names and all(".blocks.1." in name for name in names)
    assert len(groups["lora"]) == len(names)
