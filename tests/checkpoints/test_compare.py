"""What two checkpoints differ in, across generations, layouts and types."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints.llava_files import save_original, save_tower, tiny_peer
from tests.checkpoints.transformers_files import save_llava, save_qwen2
from tests.fakes import write_tiny_checkpoint
from tests.gguf_files import llama_metadata, random_state, tiny_config, write_gguf
from visavis.checkpoints.compare import Comparison, compare, distance
from visavis.checkpoints.gguf.decoder import gguf_state
from visavis.checkpoints.inspect import describe


def compared(a: Path, b: Path) -> Comparison:
    return compare(describe(a), describe(b))


def test_types_and_small_differences(tmp_path: Path) -> None:
    save_qwen2(tmp_path / "a")
    save_qwen2(tmp_path / "b", dtype=torch.bfloat16)
    found = compared(tmp_path / "a", tmp_path / "b")
    assert set(found.types.values()) == {("float32", "bfloat16")} and len(found.types) == 27
    assert 0 < max(found.values.values()) < 0.05
    assert list(found.values.values()) == sorted(found.values.values(), reverse=True)


def test_names_of_both_generations_are_the_same(tmp_path: Path) -> None:
    save_llava(tmp_path / "a")
    save_llava(tmp_path / "b")
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    renamed = {
        name.replace("language_model.model.", "model.language_model."): t
        for name, t in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / "b" / "model.safetensors")
    assert compared(tmp_path / "a", tmp_path / "b").same


def test_two_layouts_are_compared_by_our_names(tmp_path: Path) -> None:
    """LLaVA's original layout against the same weights in transformers'."""
    peer = tiny_peer()
    save_original(tmp_path / "a", peer)
    save_tower(tmp_path / "a" / "vision_tower", peer)
    save_llava(tmp_path / "b", peer.config.text_config)
    peer.save_pretrained(tmp_path / "b")
    found = compared(tmp_path / "a", tmp_path / "b")
    assert (found.only_in_a, found.only_in_b, found.values, found.shapes) == ([], [], {}, {})
    assert found.compared > 40
    assert found.settings == {"pictures.resize": ('"pad"', '"crop"')}


def test_native_folders_and_gguf_files(tmp_path: Path) -> None:
    a, b = (write_tiny_checkpoint(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    assert compared(a, a).same and not compared(a, b).same
    config = tiny_config()
    files = []
    for seed in (0, 1):
        tensors = dict(gguf_state(random_state(config, seed), config))
        files.append(write_gguf(tmp_path / f"{seed}.gguf", llama_metadata(config), tensors))
    assert compared(files[0], files[0]).same
    assert len(compared(*files).values) > 10


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.5),
        ([math.nan, 1.0], [math.nan, 1.0], 0.0),
        ([math.inf], [math.inf], 0.0),
        ([math.nan], [1.0], math.inf),
        ([-math.inf], [1.0], math.inf),
        ([], [], 0.0),
    ],
)
def test_distance(a: list[float], b: list[float], expected: float) -> None:
    assert distance(torch.tensor(a), torch.tensor(b)) == expected
    assert distance(torch.tensor(b).half(), torch.tensor(a)) == expected
