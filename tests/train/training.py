"""What tests of training share: tiny samples of both kinds, and a tiny run on them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from tests.fakes import picture, write_tiny_checkpoint
from visavis.api import load
from visavis.data.examples import ContrastiveExample, Conversation
from visavis.data.sampler import SourceSampler, SourceShare
from visavis.inputs import Image, Message, Prompt, Text
from visavis.train.data_loader import DataLoader
from visavis.train.distributed import TrainModule
from visavis.train.loop import LoopSettings, Run, train_loop
from visavis.train.losses import Contrast
from visavis.train.objectives import Task
from visavis.train.objectives.contrastive import ContrastiveTask
from visavis.train.objectives.generative import GenerativeTask

WORDS = ("red", "green", "blue", "wide", "narrow", "round", "flat", "old")


def chats(num: int) -> list[Conversation]:
    """Conversations of different lengths, every third without a picture."""
    samples = []
    for number in range(num):
        question = Text("what is it? " * (number % 4 + 1))
        shown = () if number % 3 == 2 else (Image(picture(number)),)
        answer = Message("assistant", (Text(WORDS[number % len(WORDS)] * (number % 5 + 1)),))
        prompt = Prompt((Message("user", (*shown, question)), answer))
        samples.append(Conversation(f"chat-{number}", prompt))
    return samples


def matches(num: int) -> list[ContrastiveExample]:
    """Queries in words, pictures as targets, none to two hard negatives."""
    return [
        ContrastiveExample(
            f"match-{number}",
            Prompt.of(f"the picture that is {WORDS[number % len(WORDS)]}, number {number}"),
            Prompt.of(picture(number)),
            tuple(Prompt.of(picture(100 + number + i)) for i in range(number % 3)),
        )
        for number in range(num)
    ]


class TinyRun:
    """A tiny model with both objectives at hand, trained in its connector, decoder and head."""

    def __init__(self, *, precision: str = "no") -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.model = load(write_tiny_checkpoint(Path(folder)), precision="f32", device="cpu")
        self.vlm = self.model.vlm
        self.loader = DataLoader(self.model.encoder)
        AcceleratorState._reset_state()  # it is one per process, whatever the precision
        self.accelerator = Accelerator(cpu=True, mixed_precision=precision)
        self.trainee = TrainModule(self.vlm)
        parts: dict[str, nn.Module | None] = {
            "connector": self.vlm.connector,
            "language_model": self.vlm.decoder,
        }
        self.groups = {name: list(part.parameters()) for name, part in parts.items() if part}
        for parameters in self.groups.values():
            for parameter in parameters:
                parameter.requires_grad_(True)

    def generative(
        self, *, micro_tokens: int = 10_000, batch: int = 6, samples: Sequence[Conversation] = ()
    ) -> GenerativeTask:
        samples = samples or chats(9)
        sampler = SourceSampler({"chats": SourceShare(len(samples))}, seed=3)
        return GenerativeTask(
            {"chats": samples}, sampler, self.loader, batch=batch, micro_tokens=micro_tokens
        )

    def contrastive(
        self,
        *,
        chunk_tokens: int = 10_000,
        batch: int = 6,
        samples: Sequence[ContrastiveExample] = (),
        **settings: Any,
    ) -> ContrastiveTask:
        samples = samples or matches(9)
        sampler = SourceSampler({"matches": SourceShare(len(samples))}, seed=5)
        return ContrastiveTask(
            {"matches": samples},
            sampler,
            self.loader,
            Contrast(symmetric=True, alpha=9.0),
            batch=batch,
            chunk_tokens=chunk_tokens,
            scale=20.0,
            pooling="last",
            **settings,
        )

    def train(
        self, task: Task, folder: Path, *, identity: str = "", **settings: Any
    ) -> list[dict[str, Any]]:
        """Train; return the log."""
        lines: list[dict[str, Any]] = []
        train_loop(self.stage(task, folder, lines.append, identity=identity, **settings))
        return lines

    def stage(
        self, task: Task, folder: Path, log: Any, *, identity: str = "", **settings: Any
    ) -> Run:
        rates = dict.fromkeys(self.groups, 1e-3)
        numbers = {"steps": 4, "learning_rates": rates, "log_every": 1, "save_every": 2, **settings}
        return Run(
            self.trainee,
            task,
            self.groups,
            LoopSettings(**numbers),
            folder,
            self.accelerator,
            log,
            rewind=getattr(log, "rewind", lambda step: None),
            identity=identity,
        )

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for group in self.groups.values() for p in group])
