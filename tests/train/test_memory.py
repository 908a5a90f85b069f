"""Memory of a contrastive step stays where it is when the batch grows, pictures included."""

from __future__ import annotations

import multiprocessing
import resource
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from tests.fakes import byte_tokenizer, tiny_config
from visavis.data.examples import ContrastiveExample
from visavis.data.sampler import SourceSampler, SourceShare
from visavis.inputs import Prompt
from visavis.model.config import ViTConfig
from visavis.model.vlm import VLM
from visavis.processing.config import ImageProcessorConfig
from visavis.processing.prompt_config import PromptConfig
from visavis.processing.prompt_encoder import PromptEncoder
from visavis.processing.tokenizer import SpecialTokens

SIZE = 256  # pixels of a side: 0.8 MB a picture, as the model takes it


def peak(pictures: Path, batch: int, answer: Connection) -> None:
    """Send the most memory, in MB, that a process needs for one step, and what it had before."""
    from tests.fakes import picture
    from visavis.train.data_loader import DataLoader
    from visavis.train.distributed import TrainModule
    from visavis.train.losses import Contrast
    from visavis.train.objectives.contrastive import ContrastiveTask

    torch.set_num_threads(1)
    config = tiny_config()
    assert isinstance(config.tower, ViTConfig)
    tower = replace(config.tower, image_size=SIZE, patch_size=SIZE // 4)
    vlm = VLM(replace(config, tower=tower))
    vlm.connector.requires_grad_(True)  # type: ignore[union-attr]
    processor = ImageProcessorConfig(SIZE, "squash", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    encoder = PromptEncoder(
        "tiny",
        vlm.config,
        byte_tokenizer(),
        SpecialTokens(None, None, (), None, False),
        PromptConfig(),
        processor,
    )
    samples = []
    for number in range(batch):
        path = pictures / f"{number}.png"
        if not path.exists():
            picture(number, (SIZE, SIZE)).save(path)
        samples.append(
            ContrastiveExample(str(number), Prompt.of(f"picture {number}"), Prompt.of(path))
        )
    task = ContrastiveTask(
        {"all": samples},
        SourceSampler({"all": SourceShare(batch)}, seed=0),
        DataLoader(encoder),
        Contrast(),
        batch=batch,
        chunk_tokens=128,
        scale=20.0,
        pooling="last",
    )

    class Alone:
        world, rank = 1, 0
        no_sync = staticmethod(nullcontext)

        def backward(self, loss: torch.Tensor, gradient: torch.Tensor | None = None) -> None:
            loss.backward(gradient)

        def passes(self, number: int) -> int:
            return number

        def sum(self, value: float) -> float:
            return value

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    task.step(TrainModule(vlm), Alone())  # type: ignore[arg-type]
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer.send((before / 1024, after / 1024))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_batch(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    grown = {}
    for batch in (64, 512):
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=peak, args=(tmp_path, batch, theirs))
        process.start()
        before, after = ours.recv()
        process.join()
        grown[batch] = after - before
    held = (512 - 64) * SIZE * SIZE * 3 * 4 / 2**20  # what all their pixels would take
    assert held > 300 and grown[512] - grown[64] < 60, grown
