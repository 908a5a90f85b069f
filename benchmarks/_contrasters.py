"""Engines that take a contrastive step of captions and pictures, cached and not.

Started by gradcache.py. Ours is the objective of `visavis train`; the peer is sentence-transformers
with its own modules and losses, its batch made by `preprocess`, as its trainer's collator does.
Both go as far as the gradients.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _harness import serve
from _llava import write_llava

THREADS = int(os.environ["OMP_NUM_THREADS"])
CHUNK = 32  # pictures of a pass, in both
SCALE = 50.0
TEXT = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
VISION = {
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "image_size": 112,
    "patch_size": 14,
}
PATCHES = (VISION["image_size"] // VISION["patch_size"]) ** 2
STATUS = Path("/proc/self/status")

Pairs = list[tuple[str, str]]  # captions, and paths of pictures


class Visavis:
    """The public objective; a chunk holds as many tokens as the peer's does of pictures."""

    def write(self, folder: str) -> dict[str, Any]:
        write_llava(Path(folder), TEXT, VISION)
        return {}

    def load(self, folder: str) -> dict[str, Any]:
        import torch
        from accelerate import Accelerator

        import visavis
        from visavis.train.data_loader import DataLoader
        from visavis.train.distributed import Processes, TrainModule

        torch.set_num_threads(THREADS)
        model = visavis.load(folder, precision="f32", device="cpu")
        self.vlm = model.vlm
        self.loader = DataLoader(model.encoder)
        parts = {"connector": self.vlm.connector, "language_model": self.vlm.decoder}
        groups = {name: list(part.parameters()) for name, part in parts.items()}
        for parameter in (p for group in groups.values() for p in group):
            parameter.requires_grad_(True)
        self.trainee = TrainModule(self.vlm).train()
        self.processes = Processes(Accelerator(cpu=True), self.trainee, groups)
        return {}

    def step(self, pairs: Pairs, cached: bool) -> dict[str, Any]:
        return _measured(self.vlm, lambda: self._cached(pairs) if cached else self._whole(pairs))

    def _cached(self, pairs: Pairs) -> float:
        from visavis.data.sampler import SourceSampler, SourceShare
        from visavis.train.losses import Contrast
        from visavis.train.objectives.contrastive import ContrastiveTask

        samples = _matches(pairs)
        task = ContrastiveTask(
            {"all": samples},
            SourceSampler({"all": SourceShare(len(samples))}, seed=0),
            self.loader,
            Contrast(),
            batch=len(samples),
            chunk_tokens=CHUNK * PATCHES,
            scale=SCALE,
            pooling="last",
        )
        return task.step(self.trainee, self.processes)[0].loss

    def _whole(self, pairs: Pairs) -> float:
        from visavis.train.losses import Contrast, contrastive_loss

        samples = _matches(pairs)
        prompts = [one.query for one in samples] + [one.target for one in samples]
        ids = [one.id for one in samples] * 2
        encoded = [self.loader.item(id, one) for id, one in zip(ids, prompts, strict=True)]
        vectors = self.trainee(self.loader.pack(prompts, encoded, ids=ids), "vectors")
        queries, targets = vectors.chunk(2)
        loss = contrastive_loss(queries, targets, Contrast(), scale=SCALE)
        loss.backward()
        return float(loss)


class SentenceTransformers:
    """Its modules for a model that sees, and its losses."""

    def load(self, folder: str) -> dict[str, Any]:
        import torch
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer import losses, modules

        torch.set_num_threads(THREADS)
        transformer = modules.Transformer(folder)
        width = transformer.get_embedding_dimension()
        pooling = modules.Pooling(width, pooling_mode="lasttoken")
        self.model = SentenceTransformer(
            modules=[transformer, pooling, modules.Normalize()], device="cpu"
        ).train()
        transformer.model.vision_tower.requires_grad_(False)
        self.losses = {
            True: losses.CachedMultipleNegativesRankingLoss(
                self.model, scale=SCALE, mini_batch_size=CHUNK
            ),
            False: losses.MultipleNegativesRankingLoss(self.model, scale=SCALE),
        }
        return {}

    def step(self, pairs: Pairs, cached: bool) -> dict[str, Any]:
        def run() -> float:
            columns = [self.model.preprocess(list(column)) for column in zip(*pairs, strict=True)]
            loss = self.losses[cached](columns, None)
            loss.backward()
            return float(loss)

        return _measured(self.model, run)


def _measured(model: Any, run: Callable[[], float]) -> dict[str, Any]:
    """Return seconds, MB above what there was before, the loss and the gradient's length."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before does not count
    before = _memory("VmRSS")
    if STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts anew
    started = time.perf_counter()
    loss = run()
    seconds = time.perf_counter() - started
    gradients = [p.grad.pow(2).sum() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return {
        "seconds": seconds,
        "memory": _memory("VmHWM") - before,
        "loss": loss,
        "norm": float(sum(gradients)) ** 0.5,
    }


def _memory(name: str) -> float:
    """Return a line of /proc/self/status in MB; elsewhere the most there ever was."""
    if not STATUS.exists():
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines[name].split()[0]) / 1024


def _matches(pairs: Pairs) -> list[Any]:
    from visavis.data.examples import ContrastiveExample
    from visavis.inputs import Prompt

    return [
        ContrastiveExample(str(number), Prompt.of(caption), Prompt.of(Path(picture)))
        for number, (caption, picture) in enumerate(pairs)
    ]


if __name__ == "__main__":
    serve({"visavis": Visavis, "sentence-transformers": SentenceTransformers})
