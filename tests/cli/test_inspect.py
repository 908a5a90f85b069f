"""`visavis inspect`: every layout from its headers, what does not fit named; what two differ in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints.anyres_files import save_next, save_onevision
from tests.checkpoints.gguf.test_gguf_split import write_split
from tests.checkpoints.idefics3_files import save_idefics3
from tests.checkpoints.internvl_files import save_internvl
from tests.checkpoints.llava_files import save_original, save_tower, tiny_peer
from tests.checkpoints.onevision15_files import save_onevision15
from tests.checkpoints.transformers_files import save_llava, save_qwen2
from tests.cli.conftest import Run
from tests.parity.qwen2_vl_files import save_qwen2_5_vl
from visavis.checkpoints import tensor_files
from visavis.checkpoints.gguf.decoder import decoder_state
from visavis.checkpoints.gguf.reader import open_model


def facts(run: Run, path: Path) -> dict[str, Any]:
    result = run("inspect", path, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def parameters(whole: dict[str, Any]) -> dict[str, int]:
    return {part["part"]: part["parameters"] for part in whole["parts"]}


@pytest.fixture
def reads() -> None:
    """A test may read tensors."""


@pytest.fixture(autouse=True)
def _headers_only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of a safetensors file is read."""
    if "reads" in request.fixturenames:
        return

    def refuse(*_: object) -> torch.Tensor:
        raise AssertionError("inspect read a tensor")

    monkeypatch.setattr(tensor_files, "_read", refuse)


def count(peer: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in peer.parameters())


def test_a_transformers_folder(run: Run, tmp_path: Path) -> None:
    peer, _ = save_llava(tmp_path)
    whole = facts(run, tmp_path)
    assert sum(parameters(whole).values()) == count(peer)
    assert whole["layout"] == "transformers" and whole["problems"] == []
    assert whole["tensor_types"] == {"float32": f"{len(peer.state_dict())} tensors"}
    assert whole["images"]["size"] == "32 px, shortest edge resized, center crop"
    assert whole["why"] == "config.json has model_type 'llava'"
    assert whole["quirks"]["whole"] == "image_token_id=259, select_layer=-2"
    shown = run("inspect", tmp_path).stdout
    assert "vision tower" in shown and "model.safetensors" in shown and "in the folder" in shown


def test_shards_and_a_language_model_alone(run: Run, tmp_path: Path) -> None:
    peer = save_qwen2(tmp_path, max_shard_size="40KB", dtype=torch.bfloat16)
    whole = facts(run, tmp_path)
    assert parameters(whole) == {"language model": count(peer)}
    assert list(whole["tensor_types"]) == ["bfloat16"] and whole["images"] == {}
    assert sum(name.endswith(".safetensors") for name in whole["files"]) > 1


def test_what_does_not_fit_is_named(run: Run, tmp_path: Path) -> None:
    save_qwen2(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.extra"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors")
    (problem,) = facts(run, tmp_path)["problems"]
    assert "missing model.norm.weight" in problem and "unexpected model.extra" in problem
    shown = run("inspect", tmp_path)
    assert shown.exit_code == 0 and "problem: the tensors of" in shown.stderr


def test_an_original_llava(run: Run, tmp_path: Path) -> None:
    peer = tiny_peer()
    save_original(tmp_path, peer, with_tower=False)
    save_tower(tmp_path / "vision_tower", peer)
    whole = facts(run, tmp_path)
    assert sum(parameters(whole).values()) == count(peer)
    assert whole["profile"]["chat template"] == "vicuna_v1" and whole["problems"] == []
    assert whole["images"]["size"] == "32 px, padded to a square with the mean colour"
    assert {"model.safetensors", "vision_tower/model.safetensors"} <= whole["files"].keys()


def test_an_original_llava_without_its_tower(run: Run, tmp_path: Path) -> None:
    named = "openai/clip-vit-large-patch14-336"
    save_original(
        tmp_path, tiny_peer(), with_tower=False, mm_vision_tower=named, mm_hidden_size=1024
    )
    whole = facts(run, tmp_path)
    assert parameters(whole)["vision tower"] > 3e8
    (problem,) = whole["problems"]
    assert "lacks its weights" in problem and named in problem


def test_a_first_stage(run: Run, tmp_path: Path) -> None:
    save_original(tmp_path, tiny_peer())
    (tmp_path / "model.safetensors").unlink()
    torch.save({"model.mm_projector.0.weight": torch.ones(32, 24)}, tmp_path / "mm_projector.bin")
    whole = facts(run, tmp_path)
    assert whole["kind"] == "llava_first_stage" and parameters(whole)[whole["layout"]] == 768
    assert "base='…'" in whole["problems"][0]


def test_any_number_of_views(run: Run, tmp_path: Path) -> None:
    """Tiles of LLaVA-NeXT, OneVision, Idefics3, InternVL; patches of OneVision-1.5, Qwen2.5-VL."""
    any_size = ("llavaonevision1_5", "qwen2_5_vl")
    for name, save in (
        ("llava_next", save_next),
        ("llava_onevision", save_onevision),
        ("idefics3", save_idefics3),
        ("internvl", save_internvl),
        ("llavaonevision1_5", save_onevision15),
        ("qwen2_5_vl", save_qwen2_5_vl),
    ):
        save(tmp_path / name)
        whole = facts(run, tmp_path / name)
        assert whole["kind"] == name and whole["problems"] == []
        assert whole["images"]["patches" if name in any_size else "tiles"]
    assert "mrope_sections=(2, 3, 3)" in whole["quirks"]["language model"]


def test_an_adapter(run: Run, tmp_path: Path) -> None:
    pair = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{name}.weight": torch.ones(*shape)
        for name, shape in (("A", (4, 32)), ("B", (32, 4)))
    }
    save_file(pair, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "a/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    whole = facts(run, tmp_path)
    assert parameters(whole) == {"LoRA adapter": 256} and whole["profile"]["base"] == "a/base"


def test_a_split_gguf(run: Run, tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    whole = facts(run, paths[1])
    assert whole["layout"] == "GGUF" and list(whole["files"]) == [p.name for p in paths]
    arrays = dict(decoder_state(open_model(paths[0])[0])).values()
    assert parameters(whole) == {"language model": sum(array.size for array in arrays)}


def test_two_that_are_the_same(run: Run, tmp_path: Path, reads: None) -> None:
    save_qwen2(tmp_path / "a")
    save_qwen2(tmp_path / "b", max_shard_size="40KB")
    result = run("inspect", tmp_path / "a", tmp_path / "b")
    assert (
        result.exit_code == 0 and "values: 0 of 27 tensors differ\nno differences" in result.stdout
    )


def test_two_that_differ(run: Run, tmp_path: Path, reads: None) -> None:
    save_qwen2(tmp_path / "a")
    save_qwen2(tmp_path / "b")
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    tensors["model.norm.weight"][3] += 0.5
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] -= 2
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(3, 3)
    tensors["extra"] = tensors.pop("lm_head.weight")
    save_file(tensors, tmp_path / "b" / "model.safetensors")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    result = run("inspect", tmp_path / "a", tmp_path / "b", "--top-k", 1, "--json")
    assert result.exit_code == 1
    whole = json.loads(result.stdout)
    assert not whole["same"] and whole["settings"] == {"rms_norm_eps": ["1e-06", "0.5"]}
    assert (whole["only_in_a"], whole["only_in_b"]) == (["lm_head.weight"], ["extra"])
    assert whole["shapes"] == {"model.layers.1.mlp.up_proj.weight": ["(48, 32)", "(3, 3)"]}
    assert whole["types"] == {}
    (largest,) = whole["values"].pop("largest")
    assert largest["tensor"] == "model.layers.0.mlp.up_proj.weight"
    assert largest["max_abs"] == pytest.approx(2)
    assert whole["values"] == {"compared": 25, "different": 2}
    shown = run("inspect", tmp_path / "a", tmp_path / "b")
    assert shown.exit_code == 1 and "rms_norm_eps  1e-06  →  0.5" in shown.stdout
    assert "only in b: 1 tensors\n  extra" in shown.stdout


def test_two_that_are_no_pair(run: Run, tmp_path: Path) -> None:
    save_qwen2(tmp_path / "a")
    result = run("inspect", tmp_path / "a", write_split(tmp_path)[0])
    assert result.exit_code == 2 and "Compare two of a kind" in result.stderr
    assert run("inspect", tmp_path / "a", tmp_path / "b").exit_code == 2
