"""Our own folder holds every model that loads: config, tensors, tokenizer, profile and picture
sizing come back the same, and so do vectors, bit by bit, in each precision.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, Dinov2Config

import visavis
from tests.checkpoints.anyres_files import save_onevision
from tests.checkpoints.idefics3_files import save_idefics3
from tests.checkpoints.internvl_files import save_internvl
from tests.checkpoints.onevision15_files import save_onevision15
from tests.checkpoints.phi3v_files import save_phi3v, tiny_tower
from tests.checkpoints.tinyllava_files import DINOV2, Peer, save_repository, save_stage
from tests.checkpoints.transformers_files import VISION, save_qwen2
from tests.fakes import picture, write_tiny_checkpoint
from tests.parity.qwen2_vl_files import save_qwen2_5_vl, save_qwen2_vl, save_qwen3_vl
from tests.parity.test_gguf_families import build_peer
from tests.parity.test_gguf_families import write as write_gguf_file
from visavis.checkpoints.checkpoint import whole_state
from visavis.checkpoints.load import load_checkpoint, resolve
from visavis.checkpoints.native import write_native

__all__ = ["tiny_tower"]  # a fixture, used by every test
pytestmark = pytest.mark.parity

SQUARE_CLIP = {**VISION, "image_size": 40}
SOURCES: dict[str, Callable[[Path], Any]] = {
    "native, pixel shuffle, head": write_tiny_checkpoint,
    "transformers, text": save_qwen2,
    "LLaVA-OneVision": save_onevision,
    "Qwen2-VL": save_qwen2_vl,
    "Qwen2.5-VL": save_qwen2_5_vl,
    "Qwen3-VL": save_qwen3_vl,
    "Idefics3": save_idefics3,
    "SmolVLM2": lambda folder: save_idefics3(folder, smolvlm=True, tied=True),
    "InternVL": save_internvl,
    "LLaVA-OneVision-1.5": save_onevision15,
    "Phi-3.5-vision": save_phi3v,
    "TinyLLaVA stage": lambda folder: save_stage(folder, Peer()),
    "TinyLLaVA, mixture of towers": lambda folder: save_repository(
        folder, Peer(None, CLIPVisionConfig(**SQUARE_CLIP), Dinov2Config(**DINOV2))
    ),
    "GGUF, 4 bits": lambda folder: write_gguf_file(
        folder / "m.gguf",
        "qwen2, tied",
        build_peer("qwen2, tied", intermediate_size=64),
        quantised=True,
    ),
}


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("name", SOURCES)
def test_every_model_comes_back(name: str, precision: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    SOURCES[name](tmp_path / "in")
    assert_comes_back(tmp_path / "in", tmp_path / "out", precision)


def test_nano(tmp_path: Path, nano_files: object) -> None:
    """An adapter on packed 4-bit blocks becomes one folder that needs neither."""
    assert_comes_back(resolve("nano"), tmp_path / "out", "bf16")


def assert_comes_back(source: Path, out: Path, precision: str) -> None:
    out.mkdir()
    first = load_checkpoint(source, precision=precision, device="cpu")
    write_native(first, out)
    second = load_checkpoint(out, precision=precision, device="cpu")
    ours, theirs = whole_state(first.vlm), whole_state(second.vlm)
    assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in theirs.items()}
    assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []
    assert first.vlm.config == second.vlm.config
    assert (first.specials, first.profile) == (second.specials, second.profile)
    assert first.processor == second.processor
    items: list[Any] = ["a text", "ein längerer Text <|im_end|>"]
    if first.vlm.tower is not None:
        items += [{"image": picture(1, (90, 61)), "text": "red"}, picture(2)]
    vectors = [visavis.Model.of(loaded).embed(items) for loaded in (first, second)]
    assert np.array_equal(*vectors)
