"""How much memory loading takes beyond the weights it ends with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.checkpoints.transformers_files import TEXT, save_qwen2

# After a small model, so that code and libraries are in memory already.
MEASURE = """
import json, resource, sys
import visavis

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

small, large, precision = sys.argv[1:]
visavis.load(small, precision=precision, device="cpu")
before = peak()
model = visavis.load(large, precision=precision, device="cpu")
tensors = {t.data_ptr(): t.numel() * t.element_size() for t in model.vlm.parameters()}
print(json.dumps([peak() - before, sum(tensors.values())]))
"""
SIZES = {"vocab_size": 16000, "hidden_size": 1024, "intermediate_size": 2816}
SIZES |= {"num_hidden_layers": 10, "num_attention_heads": 16, "num_key_value_heads": 4}


def ratio(*words: object) -> float:
    command = [sys.executable, "-c", MEASURE, *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, weights = json.loads(result.stdout)
    assert weights > 2e8
    return grown / weights


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    save_qwen2(folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("precision", ["bf16", "f32"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_folder_takes_little_more_than_its_weights(
    stored: torch.dtype, precision: str, kind: str, small: Path, tmp_path: Path
) -> None:
    save_qwen2(tmp_path)
    with torch.device("meta"):
        peer = Qwen2ForCausalLM(Qwen2Config(**TEXT | SIZES))
    peer = peer.to(stored).to_empty(device="cpu")
    for parameter in peer.parameters():
        torch.nn.init.ones_(parameter)
    peer.save_pretrained(tmp_path)
    if kind == "bin":
        whole = tmp_path / "model.safetensors"
        torch.save(load_file(whole), tmp_path / "pytorch_model.bin")
        whole.unlink()
    assert ratio(small, tmp_path, precision) < 1.25  # measured 1.00 to 1.10


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_a_gguf_file_takes_little_more_than_its_weights(
    small: Path, nano_files: dict[str, Path]
) -> None:
    assert ratio(small, nano_files["language_model"], "f32") < 1.25  # measured 1.08
