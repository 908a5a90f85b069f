"""Two processes take the steps of one, with shared gradients (DDP) and sharded parameters (FSDP2),
and a run goes on with another number of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from tests.train.training import TinyRun, chats
from visavis.errors import TrainError
from visavis.train.lora import add_lora
from visavis.train.objectives.contrastive import JointTask
from visavis.train.recipe import LoraRecipe

SETTINGS: dict[str, Any] = {"ema": 0.3, "weight_decay": 0.1}


def joint(run: TinyRun, small: bool) -> JointTask:
    """Both objectives; cut into more passes on one process than on the other with `small`."""
    generative = run.generative(micro_tokens=80 if small else 10_000)
    contrastive = run.contrastive(chunk_tokens=60 if small else 10_000, learned_scale=True)
    run.groups["temperature"] = [contrastive.log_scale]
    return JointTask([generative, contrastive])


def texts(run: TinyRun, micro_tokens: int = 10_000) -> Any:
    """One conversation of six has a picture: most passes are without one."""
    samples = [chats(1)[0], *chats(18)[2::3][:5]]
    return run.generative(samples=samples, batch=6, micro_tokens=micro_tokens)


def with_lora(run: TinyRun) -> TinyRun:
    """Adapters are trained on frozen weights of another type."""
    torch.manual_seed(0)
    run.vlm.requires_grad_(False)
    run.vlm.cast(torch.bfloat16)
    add_lora(run.vlm.decoder, LoraRecipe(rank=4))
    own = [p for name, p in run.vlm.named_parameters() if ".lora_" in name]
    run.groups = {"lora": own}
    return run


def one_process(number: int, store: Path, out: Path) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": str(number)}
    dist.init_process_group("gloo", f"file://{store}", rank=number, world_size=2)
    found: dict[str, Any] = {}
    for kind in ("fsdp", "ddp"):
        os.environ["ACCELERATE_USE_FSDP"] = str(kind == "fsdp").lower()
        run = TinyRun()
        lines = run.train(joint(run, small=True), out / kind, **SETTINGS)
        found[kind] = (lines, run.weights())
        run = TinyRun()
        lines = run.train(texts(run, micro_tokens=60), out / f"{kind}-texts")
        found[f"{kind}-texts"] = (lines, run.weights())
        run = with_lora(TinyRun())
        found[f"{kind}-lora"] = (run.train(run.contrastive(), out / f"{kind}-lora"), run.weights())
        run = TinyRun()  # goes on from one process, is then gone on from by one
        lines = run.train(joint(run, small=True), out / f"{kind}-on", stop_after=3, **SETTINGS)
        found[f"{kind}-on"] = (lines, run.weights())
    if number == 0:
        torch.save(found, out / "found.pt")
    else:
        torch.save({name: weights for name, (_, weights) in found.items()}, out / "other.pt")
    with pytest.raises(TrainError, match=r"one each; raise `batch`"):
        run.train(run.generative(batch=1), out / "small")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left."""
    folder = tmp_path_factory.mktemp("processes")
    for kind in ("fsdp", "ddp"):
        run = TinyRun()
        run.train(joint(run, small=False), folder / f"{kind}-on", stop_after=2, **SETTINGS)
    spawn(one_process, (folder / "store", folder), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Any], TinyRun]]:
    """The steps of one process."""
    run = TinyRun()
    yield run.train(joint(run, small=False), tmp_path_factory.mktemp("whole"), **SETTINGS), run


def compare(found: Any, expected: list[Any], run: TinyRun) -> None:
    lines, weights = found
    for one, other in zip(lines, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-5)
        assert one["norm"] == pytest.approx(other["norm"], rel=1e-3)
        assert one["tokens"] == other["tokens"]
    torch.testing.assert_close(weights, run.weights(), atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_two_processes_take_the_steps_of_one(kind: str, folder: Path, whole: Any) -> None:
    expected, run = whole
    found = torch.load(folder / "found.pt")[kind]
    compare(found, expected, run)
    assert torch.equal(torch.load(folder / "other.pt")[kind], found[1])


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
@pytest.mark.parametrize("case", ["texts", "lora"])
def test_processes_may_differ_in_what_they_use(
    kind: str, case: str, folder: Path, tmp_path: Path
) -> None:
    run = with_lora(TinyRun()) if case == "lora" else TinyRun()
    expected = run.train(run.contrastive() if case == "lora" else texts(run), tmp_path)
    found = torch.load(folder / "found.pt")[f"{kind}-{case}"]
    if case == "texts":
        compare(found, expected, run)
        return
    for one, other in zip(found[0], expected, strict=True):  # bfloat16 rounds by company
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-2)


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_a_run_goes_on_with_another_number_of_processes(
    kind: str, folder: Path, whole: Any
) -> None:
    expected, unbroken = whole
    run = TinyRun()
    last = run.train(joint(run, small=False), folder / f"{kind}-on", **SETTINGS)
    (middle,), _ = torch.load(folder / "found.pt")[f"{kind}-on"]
    assert middle["step"] == 3 and [line["step"] for line in last] == [4]
    compare(([*expected[:2], middle, *last], run.weights()), expected, unbroken)
