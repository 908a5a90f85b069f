"""Which layout files are in: decided by what they hold, whatever they are called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.gguf_files import write_gguf
from visavis.checkpoints.formats import FORMATS, TARGETS, detect
from visavis.errors import CheckpointError


def write(folder: Path, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(json.dumps(content))
    return folder


LLAVA = {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "model_type": "llava"}
FOLDERS: dict[str, tuple[dict[str, Any], str, str]] = {
    "native": ({"visavis__json": {}, "config__json": {}}, "native", "it has visavis.json"),
    "adapter": ({"adapter_config__json": {}}, "adapter", "it has adapter_config.json"),
    "adapter of LLaVA": (
        {"adapter_config__json": {}, "config__json": LLAVA},
        "adapter",
        "it has adapter_config.json",
    ),
    **{
        kind: ({"config__json": {"model_type": kind}}, expected, f"has model_type {kind!r}")
        for kind, expected in (
            ("qwen2", "transformers"),
            ("llava", "transformers"),
            ("llava_next", "llava_next"),
            ("llava_onevision", "llava_onevision"),
            ("qwen2_vl", "qwen2_vl"),
            ("qwen2_5_vl", "qwen2_5_vl"),
            ("qwen3_vl", "qwen3_vl"),
            ("phi3_v", "phi3_v"),
            ("tinyllava", "tinyllava"),
        )
    },
    "LLaVA": ({"config__json": LLAVA}, "llava_original", "has mm_vision_tower"),
    "LLaVA with a projector beside": (
        {"config__json": LLAVA, "mm_projector__bin": 0, "pytorch_model__bin": 0},
        "llava_original",
        "has mm_vision_tower",
    ),
    "first stage": (
        {"config__json": LLAVA, "mm_projector__bin": 0},
        "llava_first_stage",
        "mm_projector.bin stands without a model",
    ),
    "older TinyLLaVA": (
        {"config__json": LLAVA | {"architectures": ["TinyLlavaPhiForCausalLM"]}},
        "tinyllava",
        "has architectures ['TinyLlavaPhiForCausalLM']",
    ),
    "TinyLLaVA's LoRA stage": (
        {"config__json": {"model_type": "tinyllava"}, "adapter_config__json": {}},
        "tinyllava",
        "beside adapter_config.json",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(name: str, tmp_path: Path) -> None:
    files, kind, why = FOLDERS[name]
    found = detect(write(tmp_path / "qwen2-llava-lora", **files))  # what names say is not heard
    assert found.kind == kind and why in found.why
    assert all(path.is_file() for path in found.files)


def test_gguf_files(tmp_path: Path) -> None:
    for architecture, kind in (("llama", "gguf"), ("clip", "mmproj")):
        path = write_gguf(tmp_path / "mmproj.bin", {}, {}, architecture=architecture)
        found = detect(path)
        assert found.kind == kind and f"general.architecture {architecture!r}" in found.why
    path.rename(tmp_path / "x.gguf")
    assert detect(tmp_path).kind == "gguf"


def test_every_format_has_its_own_name() -> None:
    for name in ("kind", "title"):
        assert len({getattr(one, name) for one in FORMATS}) == len(FORMATS)
    types = [kind for one in FORMATS for kind in one.model_types]
    assert len(types) == len(set(types))
    expected = {"native", "transformers", "llava", "tinyllava", "gguf", "sentence-transformers"}
    assert TARGETS.keys() == expected


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        detect(path)
    return str(raised.value)


def test_unknown_ones_name_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, config__json={"model_type": "llava_nxt", "architectures": ["X"]})
    assert "did you mean 'llava_next'" in refusal(tmp_path) and "['X']" in refusal(tmp_path)
    for settings in ({}, {"model_type": [1]}, {"model_type": None, "architectures": [None]}):
        write(tmp_path, config__json=settings)
        assert "expected a kind of model that is read here" in refusal(tmp_path)
    (tmp_path / "config.json").unlink()
    assert "holds nothing, but neither" in refusal(tmp_path)


def test_files_that_are_something_else(tmp_path: Path) -> None:
    for content in (b"<!doctype html>" * 9, b"version https://git-lfs.github.com/spec/v1\noid"):
        (tmp_path / "model.gguf").write_bytes(content)
        assert "not a GGUF file (perhaps a web page or a Git LFS pointer" in refusal(
            tmp_path / "model.gguf"
        )
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    assert f"give {tmp_path}" in refusal(tmp_path / "model.safetensors")
    assert "cannot read" in refusal(tmp_path / "absent.gguf")
