"""Answers at the default precision depend on the prompt alone: no cache, repetition, company or
order changes a token."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import visavis
from tests.fakes import picture, tiny_config, write_tiny_checkpoint
from tests.parity.qwen2_vl_files import save_qwen2_vl
from visavis.api import Model
from visavis.generate.prefix_cache import PrefixCache
from visavis.inputs import Prompt
from visavis.processing.feature_cache import FeatureCache

QUESTIONS = [
    "What is shown?",
    "Name the colours that you can see, one after another, from left to right.",
    "Is there an animal in this image? Answer yes or no, and say in a sentence how you know.",
    "What is shown? Write a title for it.",
]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma": {"norm_offset": 1.0, "activation": "gelu_tanh", "ffn_width": 40, "qk_norm": True},
    "phi": {
        "norm": "layer",
        "gated": False,
        "activation": "gelu",
        "parallel_block": True,
        "rope_fraction": 0.5,
    },
    "window": {"sliding_window": 48},
}


def make(family: str, folder: Path, precision: str) -> Model:
    config = tiny_config()
    decoder = replace(config.decoder, **FAMILIES[family])
    path = write_tiny_checkpoint(folder, config=replace(config, decoder=decoder))
    return visavis.load(path, precision=precision, device="cpu")


def scores_of(model: Model, prompts: list[Any], number: int, company: int, **options: Any) -> Any:
    """Return tokens and the logits of every step of each prompt's answer."""
    answers = [model.ask(Prompt.of(one), max_new_tokens=number, **options) for one in prompts]
    seen: list[list[torch.Tensor]] = [[] for _ in answers]

    def watched(answer: Any, rows: list[torch.Tensor]) -> Any:
        sample = answer.sequence.sample

        def choose(row: torch.Tensor) -> int:
            rows.append(row.clone())
            token: int = sample(row)
            return token

        return choose

    for answer, rows in zip(answers, seen, strict=True):
        answer.sequence.sample = watched(answer, rows)
    for _ in model.engine(company).run([answer.sequence for answer in answers]):
        pass
    return [
        (answer.sequence.tokens, torch.stack(rows))
        for answer, rows in zip(answers, seen, strict=True)
    ]


def check(model: Model, prompts: list[Any], number: int, **options: Any) -> None:
    """Ask in every way; tokens and all logits are bitwise those of a fresh model."""

    def forget() -> None:
        model.prefixes, model.image_encoder.cache = PrefixCache(), FeatureCache()

    alone = []
    for prompt in prompts:
        forget()
        alone += scores_of(model, [prompt], number, 1, **options)

    def same(order: list[int], company: int) -> None:
        found = scores_of(model, [prompts[i] for i in order], number, company, **options)
        for i, (tokens, scores) in zip(order, found, strict=True):
            assert tokens == alone[i][0]
            assert torch.equal(scores, alone[i][1])

    order = list(range(len(prompts)))
    same(order, 1)  # after others
    same(order, 1)  # repeated
    forget()
    model.embed(
        [{"image": one["image"]} for one in prompts if "image" in one]
    )  # features seen together
    for company in (3, 16):
        random.Random(company).shuffle(order)
        same(order, company)
    forget()
    same(order, 5)


def items() -> list[Any]:
    images = [picture(seed) for seed in (1, 2, 3)]
    return [
        *({"image": image, "text": text} for image in images for text in QUESTIONS[:3]),
        {"image": images[:2], "text": QUESTIONS[3]},
        *({"text": text} for text in QUESTIONS),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_families_answer_the_same(family: str, tmp_path: Path) -> None:
    check(make(family, tmp_path, "bf16"), items(), 6)


def test_qwen2_vl_answers_the_same(tmp_path: Path) -> None:
    save_qwen2_vl(tmp_path)
    check(visavis.load(tmp_path, precision="bf16", device="cpu"), items()[::2], 6)


@pytest.mark.parametrize("precision", ["f32", "int8"])
def test_other_precisions_answer_the_same(precision: str, tmp_path: Path) -> None:
    check(make("llama", tmp_path, precision), items()[::2], 6)


def test_sampled_answers_with_a_seed_are_the_same(tmp_path: Path) -> None:
    check(make("llama", tmp_path, "bf16"), items()[::2], 6, temperature=1.0, seed=3)


def test_beams_find_the_same(tmp_path: Path) -> None:
    model, prompts = make("gemma", tmp_path, "bf16"), items()[::3]
    alone = [model.chat_many([one], max_new_tokens=6, beams=3)[0].text for one in prompts]
    again = model.chat_many(prompts[::-1], max_new_tokens=6, beams=3)
    assert [reply.text for reply in again] == alone[::-1]


def test_answers_do_not_depend_on_the_limit(tmp_path: Path) -> None:
    """The limit sets the memory that a cache takes, and so the places of keys."""
    model, (prompt, *_) = make("llama", tmp_path, "bf16"), items()
    (long,) = scores_of(model, [prompt], 9, 1)
    for number in (1, 2, 5, 8):
        model.prefixes = PrefixCache()
        (short,) = scores_of(model, [prompt], number, 1)
        assert torch.equal(short[1], long[1][: len(short[1])])


@pytest.mark.network
def test_nano_answers_the_same(nano_files: dict[str, Path]) -> None:
    check(visavis.load("nano", device="cpu"), items()[::4], 6)


@pytest.mark.slow
@pytest.mark.network
def test_nano_answers_many_questions_the_same(nano_files: dict[str, Path]) -> None:
    images = [
        picture(seed, size) for seed in range(3) for size in ((48, 36), (300, 200), (90, 160))
    ]
    texts = [f"{text} {end}" for text in QUESTIONS[:3] for end in ("", "Be brief.", "Why?")]
    check(
        visavis.load("nano", device="cpu"),
        [{"image": image, "text": text} for image in images for text in texts],
        16,
    )
