"""Folders in transformers' layout: every way weights are stored, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import visavis
from tests.checkpoints.transformers_files import CHATML, save_llava, save_qwen2
from visavis.checkpoints import tensor_files
from visavis.checkpoints.transformers.processor import processor_config
from visavis.errors import CheckpointError, CheckpointWarning, InputError

PROMPT = [1, 5, 9, 200]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_qwen2(tmp_path)
    return tmp_path


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    save_llava(tmp_path)
    return tmp_path


def load(folder: Path) -> visavis.Model:
    return visavis.load(folder, precision="f32", device="cpu")


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        load(folder)
    return str(raised.value)


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# --- ways of storing ------------------------------------------------------------------------------


def test_shards_and_torch_files_are_the_same_model(tmp_path: Path) -> None:
    save_qwen2(tmp_path / "whole")
    expected = load(tmp_path / "whole").trace(PROMPT).logits
    save_qwen2(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    assert np.array_equal(load(tmp_path / "shards").trace(PROMPT).logits, expected)
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    (tmp_path / "whole" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "whole" / "pytorch_model.bin")
    assert np.array_equal(load(tmp_path / "whole").trace(PROMPT).logits, expected)
    names = sorted(tensors)
    half = {"a.bin": names[:9], "b.bin": names[9:]}
    for file, chosen in half.items():
        torch.save({name: tensors[name] for name in chosen}, tmp_path / "whole" / file)
    (tmp_path / "whole" / "pytorch_model.bin").unlink()
    index = {"weight_map": {name: file for file, chosen in half.items() for name in chosen}}
    (tmp_path / "whole" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert np.array_equal(load(tmp_path / "whole").trace(PROMPT).logits, expected)


def test_half_precision_weights_load_in_any_precision(folder: Path) -> None:
    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    edit_weights(folder, halve)
    full = load(folder).trace(PROMPT).logits
    half = visavis.load(folder, precision="bf16", device="cpu").trace(PROMPT).logits
    assert np.abs(full - half).max() < 0.1 * np.abs(full).max()


def test_chat_templates_are_found_wherever_they_are(folder: Path) -> None:
    assert load(folder).profile.jinja == CHATML
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="no chat template"):
        load(folder).chat("Hello")
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    edit_json(folder / "tokenizer_config.json", chat_template=named)
    assert load(folder).profile.jinja == CHATML
    edit_json(folder / "tokenizer_config.json", chat_template=CHATML)
    assert load(folder).profile.jinja == CHATML
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "other"}))
    assert load(folder).profile.jinja == "other"


def test_the_processor_is_found_in_either_file(llava: Path) -> None:
    expected = load(llava).processor
    inner = json.loads((llava / "processor_config.json").read_text())["image_processor"]
    (llava / "preprocessor_config.json").write_text(json.dumps(inner))
    (llava / "processor_config.json").unlink()
    assert load(llava).processor == expected
    (llava / "preprocessor_config.json").unlink()
    assert "says nowhere how pictures are resized" in refusal(llava)


def test_fingerprints_tell_models_apart(folder: Path) -> None:
    first = load(folder).fingerprint
    assert load(folder).fingerprint == first
    edit_weights(folder, lambda tensors: tensors["model.norm.weight"].add_(1))
    assert load(folder).fingerprint != first


# --- what is refused ------------------------------------------------------------------------------


def test_incomplete_folders(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "elsewhere.json")
    assert "tokenizer.json" in refusal(folder)
    (folder / "elsewhere.json").rename(folder / "tokenizer.json")
    (folder / "model.safetensors").unlink()
    assert "no weights; expected model.safetensors" in refusal(folder)
    (folder / "config.json").unlink()
    assert "neither visavis.json nor config.json" in refusal(folder)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    save_qwen2(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert f"lacks {shard.name}" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a\\b.bin", "..", ""])
def test_an_index_names_no_paths(tmp_path: Path, name: str) -> None:
    save_qwen2(tmp_path / "model", max_shard_size="20KB")
    save_file({"x": torch.zeros(1)}, tmp_path / "secret.safetensors")
    index = tmp_path / "model" / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"] | {"x": name}
    edit_json(index, weight_map=weight_map)
    assert "expected names of files beside it" in refusal(tmp_path / "model")


@pytest.mark.parametrize(
    "content", ["", "[]", "{", "{}", '{"weight_map": 3}', '{"weight_map": {}}']
)
def test_broken_indexes(folder: Path, content: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refusal(folder)


def test_the_same_tensor_in_two_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "a.safetensors")
    save_file({"model.norm.weight": torch.ones(32)}, folder / "b.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "a.safetensors") | {"y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.norm.weight stands in a.safetensors and in b.safetensors" in refusal(folder)


@given(data=st.data())
@settings(max_examples=60)
def test_damaged_safetensors_end_in_one_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A header that is cut, or has bytes changed, is refused or is still a whole header."""
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.arange(4)}, path)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        found = tensor_files.read_tensors([path])
    except CheckpointError as error:
        assert "damaged.safetensors" in str(error)
    else:
        assert sum(t.numel() * t.element_size() for t in found.values()) <= len(content)


def test_damaged_torch_files_end_in_one_error(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(50, 3)}, path)
    content = path.read_bytes()
    for kept in (0, 10, len(content) // 2, len(content) - 30):
        path.write_bytes(content[:kept])
        with pytest.raises(CheckpointError, match="cannot read .*pytorch_model.bin"):
            tensor_files.read_tensors([path])


class Code:
    """What a hostile pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("was-run"),))


def test_torch_files_with_more_than_tensors(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    for content in (
        {"a": torch.ones(2), "code": Code()},
        {"model": {"a": torch.ones(2)}},
        [torch.ones(2)],
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match="tensors"):
            tensor_files.read_tensors([path])
    assert not Path("was-run").exists()
    torch.save({"a": torch.ones(1).expand(10**9)}, path)
    with pytest.raises(CheckpointError, match="a is larger than its file"):
        tensor_files.read_tensors([path])
    torch.save({"a": torch.ones(5000)}, tmp_path / "plain.bin")
    with zipfile.ZipFile(tmp_path / "plain.bin") as plain, zipfile.ZipFile(path, "w") as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        tensor_files.read_tensors([path])
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="torch 1.6 or newer"):
        tensor_files.read_tensors([path])


def test_weights_that_are_no_numbers(folder: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")

    edit_weights(folder, spoil)
    with pytest.warns(CheckpointWarning, match=r"blocks\.1\.down\.weight of .* holds NaN"):
        visavis.load(folder, precision="f32", device="cpu")


def test_large_half_precision_weights_are_finite() -> None:
    """Their sum is beyond float16, they are not."""
    tensor_files.check_values("a", torch.full((300,), 60000.0).half(), "here")


def test_quantised_weights(folder: Path) -> None:
    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.mlp.down_proj.weight"
        tensors[name] = tensors[name].to(torch.int8)

    edit_weights(folder, quantise)
    assert "is int8, expected floating-point weights" in refusal(folder)
    edit_json(folder / "config.json", quantization_config={"quant_method": "awq"})
    assert "quantised by 'awq'" in refusal(folder)


def test_configs_that_belong_elsewhere(folder: Path) -> None:
    edit_json(folder / "config.json", mm_vision_tower="openai/clip-vit-large-patch14-336")
    assert "LLaVA's original layout" in refusal(folder)
    edit_json(folder / "config.json", mm_vision_tower=None, model_type="mistrl")
    assert "did you mean 'mistral'" in refusal(folder)
    edit_json(folder / "config.json", model_type="qwen2", hidden_size=64)
    assert "model.embed_tokens.weight has shape (264, 32), expected (264, 64)" in refusal(folder)
    edit_json(folder / "config.json", hidden_size=32, vocab_size=200)
    assert "knows the id 259" in refusal(folder)
    (folder / "config.json").write_text("[]")
    assert "config.json: holds a list" in refusal(folder)


def test_parts_of_a_llava_that_do_not_belong_together(llava: Path) -> None:
    config = json.loads((llava / "config.json").read_text())
    edit_json(llava / "config.json", image_token_index=262)
    number = config["image_token_index"]
    said = refusal(llava)
    assert "names 262 as image_token_index, but the tokenizer has no such token" in said
    assert f"'<image>' is its token {number}" in said
    edit_json(llava / "config.json", image_token_index=number - 1)
    said = refusal(llava)  # a token of another meaning: both ids are named
    assert f"names {number - 1} as image_token_index" in said
    assert f"'<image>' is its token {number}" in said
    edit_json(llava / "config.json", image_token_index=config["image_token_index"])
    processor = json.loads((llava / "processor_config.json").read_text())
    inner = processor["image_processor"] | {
        "size": {"shortest_edge": 40},
        "crop_size": {"height": 40, "width": 40},
    }
    edit_json(llava / "processor_config.json", image_processor=inner)
    assert "pictures of 40 pixels, but its vision tower takes 32" in refusal(llava)


CLIP = {"image_processor_type": "CLIPImageProcessor"}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"image_processor_type": "LlavaNextVideoProcessor"}, "LlavaImageProcessor"),
        ({}, "image processor is a None"),
        (CLIP | {"do_resize": False}, "do_resize"),
        (CLIP | {"rescale_factor": 1.0}, "rescale_factor"),
        (CLIP | {"resample": 5}, "resample"),
        (CLIP | {"size": {"height": 3, "width": 4}}, "size"),
        (CLIP | {"crop_size": 300}, "crop_size"),
        (CLIP | {"do_center_crop": False}, "do_center_crop"),
        (CLIP | {"image_mean": [0.5, 0.5]}, "image_mean"),
        (CLIP | {"image_std": [0.5, 0.5, "x"]}, "image_std"),
        (CLIP | {"image_std": [0.5, 0.5, 0]}, "image_std"),
        (CLIP | {"do_pad": True, "size": {"shortest_edge": 300}}, "crop_size"),
    ],
)
def test_processors_we_do_not_have(config: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        processor_config(config)


@pytest.mark.parametrize(("edge", "crop"), [(224, 224), (256, 224), (37, 32), (255, 7), (331, 329)])
def test_sizes_before_a_crop_survive_their_fraction(edge: int, crop: int) -> None:
    found = processor_config(CLIP | {"size": {"shortest_edge": edge}, "crop_size": crop})
    assert (found.size, int(found.size / found.crop_fraction)) == (crop, edge)


def test_older_spellings_of_processors() -> None:
    older = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 336, "crop_size": 336}
    newer = CLIP | {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    assert processor_config(older) == processor_config(newer)
    assert processor_config({"image_processor_type": "SiglipImageProcessorFast"}).resize == "squash"


MEASURE = """
import re, sys
from pathlib import Path
import visavis

def kilobytes(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

visavis.load(sys.argv[1], precision="bf16", device="cpu")
before = kilobytes("VmRSS")
model = visavis.load(sys.argv[2], precision="bf16", device="cpu")
peak = kilobytes("VmHWM")
print((peak - before) * 1024, sum(p.nbytes for p in model.vlm.parameters()))
"""
ALLOCATOR = 64 << 20  # bytes that it holds back, whatever the size of the model


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loading_takes_the_memory_of_the_model(tmp_path: Path, dtype: torch.dtype) -> None:
    """Whatever the file's type: tensors are read, fused and rounded one by one."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16}
    save_qwen2(tmp_path / "tiny")
    save_qwen2(tmp_path / "large", dtype=dtype, **sizes)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "tiny"), str(tmp_path / "large")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    peak, weights = map(int, result.stdout.split())
    print(f"peak memory: {peak / weights:.2f} times the weights, {weights >> 20} MiB")
    assert peak < 1.15 * weights + ALLOCATOR
