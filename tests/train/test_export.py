"""What a run leaves behind: the merged model and its adapters say the same, to us and to PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import visavis
from tests.checkpoints.transformers_files import TEXT, fast_tokenizer, save_llava
from tests.fakes import picture, write_pictures, write_tiny_checkpoint
from tests.parity.peers import assert_close, randomized
from visavis.train.export import stands_on_bundle
from visavis.train.recipe import Recipe
from visavis.train.runner import run_recipe

PROMPT = [1, 5, 9, 200, 17]


def recipe(base: Path, **changes: Any) -> Recipe:
    """Two steps of conversations; `changes` are of the model, `train` of the stage."""
    train = changes.pop("train", {"lora": 0.05})
    return Recipe.model_validate(
        {
            "name": "small",
            "model": {"base": str(base), **changes},
            "data": {"talk": {"format": "llava", "path": "talk.json"}},
            "stages": [
                {
                    "kind": "steps",
                    "name": "chat",
                    "steps": 2,
                    "warmup": 0,
                    "schedule": "constant",
                    "generative": {"sources": {"talk": {}}, "batch": 4},
                    "train": train,
                }
            ],
            "precision": "f32",
            "trackers": [],
        }
    )


def write_talk(folder: Path, *, pictures: bool) -> None:
    paths = write_pictures(folder, 4)
    rows = [
        {
            "id": str(number),
            **({"image": path.name} if pictures else {}),
            "conversations": [
                {"from": "human", "value": "<image>\nwhat?" if pictures else "what?"},
                {"from": "gpt", "value": f"it is {number}"},
            ],
        }
        for number, path in enumerate(paths)
    ]
    (folder / "talk.json").write_text(json.dumps(rows))


def load(folder: Path, **settings: Any) -> visavis.Model:
    return visavis.load(folder, precision="f32", device="cpu", **settings)


@pytest.mark.parity
@pytest.mark.parametrize("dora", [False, True])
def test_the_adapter_of_a_language_model(dora: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft (visavis[dev])")
    base = tmp_path / "base"
    peer = LlamaForCausalLM(LlamaConfig(**TEXT))
    randomized(peer)
    peer.save_pretrained(base)
    fast_tokenizer().save_pretrained(base)
    write_talk(tmp_path, pictures=False)
    lora = {"rank": 4, "dora": dora, "dropout": 0.1}
    made = recipe(base, chat_template="chatml-bare", lora=lora)
    folder = run_recipe(made, tmp_path, tmp_path / "out")
    merged = load(folder).trace(PROMPT).logits
    assert abs(merged - load(base).trace(PROMPT).logits).max() > 0.01, "nothing was trained"
    ours = load(folder / "adapter", base=base).trace(PROMPT).logits
    assert_close(torch.from_numpy(ours), torch.from_numpy(merged), "merged, adapter")
    theirs = peft.PeftModel.from_pretrained(peer.eval(), folder / "adapter").eval()
    with torch.no_grad():
        logits = theirs(torch.tensor([PROMPT])).logits[0]
    assert_close(torch.from_numpy(merged), logits, "merged, PEFT")


@pytest.mark.parity
@pytest.mark.parametrize("dora", [False, True])
def test_the_adapter_of_a_llava_brings_its_connector(dora: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft (visavis[dev])")
    base = tmp_path / "base"
    peer, processor = save_llava(base)
    write_talk(tmp_path, pictures=True)
    lora = {"rank": 4, "dora": dora}
    made = recipe(
        base, chat_template="vicuna_v1", lora=lora, train={"lora": 0.05, "connector": 0.01}
    )
    folder = run_recipe(made, tmp_path, tmp_path / "out")
    item = {"image": picture(1), "text": "What is this?"}
    merged = load(folder).trace(item)
    assert (
        abs(merged.logits - load(base, chat_template="vicuna_v1").trace(item).logits).max() > 0.01
    )
    ours = load(folder / "adapter", base=base, chat_template="vicuna_v1").trace(item)
    assert_close(torch.from_numpy(ours.logits), torch.from_numpy(merged.logits), "llava, adapter")
    theirs = peft.PeftModel.from_pretrained(peer.eval(), folder / "adapter").eval()
    values = processor.image_processor(images=[picture(1)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        ids = torch.from_numpy(merged.token_ids)[None]
        logits = theirs(input_ids=ids, pixel_values=values).logits[0]
    assert_close(torch.from_numpy(merged.logits), logits, "llava, PEFT")


def test_an_adapter_that_cannot_be_is_said(tmp_path: Path) -> None:
    base = write_tiny_checkpoint(tmp_path / "base")
    write_talk(tmp_path, pictures=True)
    made = recipe(base, lora={"rank": 2}, train={"lora": 0.01, "head": 0.01})
    folder = run_recipe(made, tmp_path, tmp_path / "out")
    assert not (folder / "adapter").exists() and load(folder).name == "small"
    last = (tmp_path / "out" / "log.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["problems"] == [
        "adapter/ is not written: head was trained beside, which no adapter holds"
    ]


def test_what_is_trained_whole_is_written_whole(tmp_path: Path) -> None:
    base = write_tiny_checkpoint(tmp_path / "base")
    write_talk(tmp_path, pictures=True)
    made = recipe(base, train={"language_model": 0.01})
    folder = run_recipe(made, tmp_path, tmp_path / "out")
    assert abs(load(folder).trace(PROMPT).logits - load(base).trace(PROMPT).logits).max() > 0.01


def test_which_models_stand_on_the_bundle() -> None:
    parts = {"language_model": "smollm2-135m", "vision_tower": "efficientnet-lite2"}
    stage = {"kind": "steps", "name": "a", "steps": 1, "generative": {"sources": {"s": {}}}}

    def stands(train: dict[str, float], **model: Any) -> bool:
        data = {"s": {"format": "llava", "path": "s.json"}}
        stages = [{**stage, "train": train}]
        return stands_on_bundle(
            Recipe.model_validate(
                {"name": "r", "model": {**parts, **model}, "data": data, "stages": stages}
            )
        )

    assert stands({"connector": 1e-3}) and stands({"lora": 1e-3}, lora={})
    assert not stands({"language_model": 1e-3}) and not stands({"vision_tower": 1e-3})
    assert not stands({"lora": 1e-3}, lora={"dora": True})
    assert not stands({"lora": 1e-3}, lora={}, quantize="int4")
    assert not stands({"connector": 1e-3}, vision_tower="somewhere/siglip")
