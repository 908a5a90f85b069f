"""Engines that train the same tiny LLaVA on the same conversations in the same order.

Started by train.py. Ours is the loop of `visavis train`; the peer is transformers' Trainer with
right-padded batches, the way LLaVA and TinyLLaVA train. The peer is given ids, masks and pixels
ready made; ours makes them from words and pictures as it goes.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from _harness import serve
from _llava import write_llava

THREADS = int(os.environ["OMP_NUM_THREADS"])
BATCH, MICRO = 16, 8  # conversations of a step, and of one padded pass of the peer
MICRO_TOKENS = 4096
RATE = 1e-4
TEXT = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
VISION = {
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "image_size": 112,
    "patch_size": 14,
}


class Visavis:
    """The public loop."""

    def write(self, folder: str, samples: str) -> dict[str, Any]:
        """Write the model's folder and conversations of the lengths of real ones."""
        import random

        write_llava(Path(folder), TEXT, VISION)
        draw = random.Random(0)
        lines = []
        for number in range(BATCH * 40):
            turns = draw.choice((1, 1, 1, 2, 3))
            pairs = [
                (_words(draw, 8 * draw.randint(2, 12)), _words(draw, _answer_length(draw)))
                for _ in range(turns)
            ]
            lines.append(
                {"id": number, "pairs": pairs, "picture": number % 50 if number % 5 else -1}
            )
        Path(samples).write_text("\n".join(map(json.dumps, lines)))
        return {}

    def load(self, folder: str, samples: str) -> dict[str, Any]:
        import torch

        import visavis
        from visavis.train.data_loader import DataLoader

        torch.set_num_threads(THREADS)
        self.folder = folder
        self.model = visavis.load(
            folder, precision="f32", device="cpu", chat_template="chatml-bare"
        )
        self.loader = DataLoader(self.model.encoder)
        self.samples = [_chat(json.loads(line)) for line in Path(samples).read_text().splitlines()]
        return {}

    def encode(self, output: str) -> dict[str, Any]:
        """Write ids, masks and pixels for the peer."""
        import torch

        ready = []
        for sample in self.samples:
            encoded = self.loader.chat(sample)
            batch = self.loader.pack([sample.prompt], [encoded], ids=[sample.id])
            pixels = batch.visuals[0].pixels if batch.visuals else None
            ready.append((encoded.token_ids, encoded.loss_mask, pixels))
        torch.save(ready, output)
        return {"tokens": [len(ids) for ids, _, _ in ready]}

    def train(self, steps: int, first: int) -> dict[str, Any]:
        from accelerate import Accelerator

        import visavis
        from visavis.train.distributed import TrainModule
        from visavis.train.loop import LoopSettings, Run, train_loop
        from visavis.train.objectives.generative import GenerativeTask

        vlm = visavis.load(
            self.folder, precision="f32", device="cpu", chat_template="chatml-bare"
        ).vlm
        chosen = self.samples[first : first + steps * BATCH]
        groups = {
            "connector": list(vlm.connector.parameters()),
            "language_model": list(vlm.decoder.parameters()),
        }
        for parameter in (p for group in groups.values() for p in group):
            parameter.requires_grad_(True)
        task = GenerativeTask(
            {"all": chosen}, _InOrder(), self.loader, batch=BATCH, micro_tokens=MICRO_TOKENS
        )
        losses: list[float] = []
        with tempfile.TemporaryDirectory() as out:
            run = Run(
                TrainModule(vlm),
                task,
                groups,
                LoopSettings(
                    steps=steps,
                    learning_rates=dict.fromkeys(groups, RATE),
                    schedule="constant",
                    log_every=1,
                    save_every=steps + 1,
                ),
                Path(out),
                Accelerator(cpu=True, mixed_precision="bf16"),
                log=lambda line: losses.append(line["loss"]["generative"]),
            )
            started = time.perf_counter()
            train_loop(run)
            seconds = time.perf_counter() - started
        return {"seconds": seconds, "losses": losses}


class Transformers:
    """Trainer with right padding."""

    def load(self, folder: str, encoded: str) -> dict[str, Any]:
        import torch

        torch.set_num_threads(THREADS)
        self.folder = folder
        self.ready = torch.load(encoded, weights_only=False)
        return {}

    def train(self, steps: int, first: int) -> dict[str, Any]:
        import torch
        from transformers import LlavaForConditionalGeneration as Llava
        from transformers import Trainer, TrainerCallback, TrainingArguments

        torch.set_num_threads(THREADS)
        model = Llava.from_pretrained(self.folder, dtype=torch.float32)
        model.model.vision_tower.requires_grad_(False)
        chosen = self.ready[first : first + steps * BATCH]
        losses: list[float] = []

        class Keep(TrainerCallback):
            def on_log(
                self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any
            ) -> None:
                if logs and "loss" in logs:
                    losses.append(float(logs["loss"]))

        class InOrder(Trainer):
            def _get_train_sampler(self, *args: Any) -> Any:
                return torch.utils.data.SequentialSampler(self.train_dataset)

        with tempfile.TemporaryDirectory() as out:
            trainer = InOrder(
                model,
                TrainingArguments(
                    out,
                    per_device_train_batch_size=MICRO,
                    gradient_accumulation_steps=BATCH // MICRO,
                    max_steps=steps,
                    learning_rate=RATE,
                    lr_scheduler_type="constant",
                    bf16=True,
                    use_cpu=True,
                    logging_steps=1,
                    save_strategy="no",
                    report_to=[],
                    remove_unused_columns=False,
                    disable_tqdm=True,
                ),
                train_dataset=chosen,
                data_collator=_collate,
                callbacks=[Keep()],
            )
            started = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - started
        return {"seconds": seconds, "losses": losses}


class _InOrder:
    """Draws one sample after the other."""

    def __init__(self) -> None:
        self.drawn = 0

    def batch(self, size: int) -> list[tuple[str, int]]:
        self.drawn += size
        return [("all", number) for number in range(self.drawn - size, self.drawn)]

    def state(self) -> dict[str, int]:
        return {"drawn": self.drawn}


def _collate(rows: list[Any]) -> dict[str, Any]:
    import torch

    longest = max(len(ids) for ids, _, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), -100)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for number, (tokens, learned, _) in enumerate(rows):
        row = torch.tensor(tokens)
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
        labels[number, : len(row)] = torch.where(torch.tensor(learned), row, -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    pixels = [pixels for _, _, pixels in rows if pixels is not None]
    return batch | ({"pixel_values": torch.cat(pixels)} if pixels else {})


def _chat(line: dict[str, Any]) -> Any:
    import numpy as np
    from PIL import Image as pil

    from visavis.data.examples import Conversation
    from visavis.inputs import Image, Message, Prompt, Text

    messages = []
    for number, (question, answer) in enumerate(line["pairs"]):
        shown: tuple[Any, ...] = ()
        if number == 0 and line["picture"] >= 0:
            random = np.random.default_rng(line["picture"])
            blocks = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
            shown = (Image(pil.fromarray(blocks).resize((160, 120))),)
        messages.append(Message("user", (*shown, Text(question))))
        messages.append(Message("assistant", (Text(answer),)))
    return Conversation(str(line["id"]), Prompt(tuple(messages)))


def _words(draw: Any, length: int) -> str:
    letters = "etaoinshrdlu      "
    return "".join(draw.choice(letters) for _ in range(length)).strip() or "a"


def _answer_length(draw: Any) -> int:
    """Mostly short, some long: like LLaVA's instruction data."""
    return min(900, max(4, int(draw.lognormvariate(4.2, 1.1))))


if __name__ == "__main__":
    serve({"visavis": Visavis, "transformers": Transformers})
