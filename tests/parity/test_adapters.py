"""LoRA adapters that PEFT wrote, against PEFT: merged on load, they give the same logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import visavis
from tests.checkpoints.llava_files import save_original, save_tower, tiny_peer, write_config
from tests.checkpoints.transformers_files import TEXT, fast_tokenizer, save_llava, save_qwen2
from tests.fakes import picture
from tests.parity.peers import assert_close, randomized
from visavis.errors import CheckpointError, InputError

peft = pytest.importorskip("peft", reason="needs peft (visavis[dev])")
pytestmark = pytest.mark.parity

PROMPT = [1, 5, 9, 200, 17]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "every linear, rank-stabilised": {"target_modules": "all-linear", "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "k_proj", "down_proj"], "use_dora": True},
    "patterns": {
        "target_modules": ["o_proj", "up_proj"],
        "rank_pattern": {"up_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.o_proj": 3},
    },
    "regular expressions": {
        "target_modules": r"model\.layers\.[01]\.(self_attn\.(q|v)_proj|mlp\..*_proj)",
        "rank_pattern": {r"^model\.layers\.0\..*q_proj": 2, "layers.[0-9].*(up|gate)_proj": 3},
        "alpha_pattern": {r"(0|2)\.mlp\.down_proj": 5, "proj": 100, "v_pro.": 2},
    },
    "head trained whole": {"target_modules": ["gate_proj"], "modules_to_save": ["lm_head"]},
}


def adapted(peer: PreTrainedModel, seed: int = 1, **settings: Any) -> Any:
    """Return the peer with a LoRA whose every number matters."""
    config = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, **settings)
    model = peft.get_peft_model(peer, config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                is_length = "magnitude" in name
                parameter.copy_(1 + 0.2 * noise if is_length else 0.4 * noise)
    return model


def load(folder: Path, **settings: Any) -> visavis.Model:
    return visavis.load(folder, precision="f32", device="cpu", **settings)


@torch.no_grad()
def compare(model: visavis.Model, peer: Any, what: str) -> None:
    theirs = peer(torch.tensor([PROMPT])).logits[0]
    assert_close(torch.from_numpy(model.trace(PROMPT).logits), theirs, what)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_language_model(name: str, tmp_path: Path) -> None:
    peer = save_qwen2(tmp_path / "base")
    plain = load(tmp_path / "base").trace(PROMPT).logits
    model = adapted(peer, **SETTINGS[name])
    model.save_pretrained(tmp_path / "adapter")
    ours = load(tmp_path / "adapter", base=tmp_path / "base")
    compare(ours, model, name)
    assert abs(ours.trace(PROMPT).logits - plain).max() > 0.1, "the adapter changes nothing"
    assert ours.name == "adapter" and ours.fingerprint != load(tmp_path / "base").fingerprint


def test_the_base_that_the_adapter_names(tmp_path: Path) -> None:
    peer = save_qwen2(tmp_path / "base")
    model = adapted(peer, target_modules=["q_proj"])
    model.peft_config["default"].base_model_name_or_path = "../base"
    model.save_pretrained(tmp_path / "adapter")
    compare(load(tmp_path / "adapter"), model, "named base")


def test_an_adapter_on_an_adapter(tmp_path: Path) -> None:
    peer = save_qwen2(tmp_path / "base")
    first = adapted(peer, target_modules=["q_proj"])
    first.save_pretrained(tmp_path / "first")
    second = adapted(first.merge_and_unload(), 2, target_modules=["q_proj", "v_proj"])
    second.peft_config["default"].base_model_name_or_path = str(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    edit(tmp_path / "first", base_model_name_or_path=str(tmp_path / "base"))
    compare(load(tmp_path / "second"), second, "chain")


@torch.no_grad()
def test_llava_of_transformers(tmp_path: Path) -> None:
    """The adapter's names are those of modules, the files' are older: one model all the same."""
    peer, processor = save_llava(tmp_path / "base")
    model = adapted(peer, target_modules=["q_proj", "fc1", "linear_2"])
    model.save_pretrained(tmp_path / "adapter")
    ours = load(tmp_path / "adapter", base=tmp_path / "base")
    image = picture(1)
    trace = ours.trace({"image": image, "text": "What is this?"})
    values = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    theirs = model(input_ids=torch.from_numpy(trace.token_ids)[None], pixel_values=values)
    assert_close(torch.from_numpy(trace.logits), theirs.logits[0], "llava, tower too")


@torch.no_grad()
@pytest.mark.parametrize("whole_base", [True, False])
def test_original_llava_with_what_was_trained_beside(whole_base: bool, tmp_path: Path) -> None:
    """The base is a LLaVA, or a Vicuna that gets its projector from the adapter's folder."""
    peer = tiny_peer()
    base, folder = tmp_path / "base", tmp_path / "adapter"
    text = LlamaForCausalLM(LlamaConfig(**TEXT))
    randomized(text, seed=5)
    for name, tensor in text.model.state_dict().items():
        peer.model.language_model.state_dict()[name].copy_(tensor)
    peer.lm_head.weight.copy_(text.lm_head.weight)
    tensors = save_original(base, peer)
    if not whole_base:
        (base / "model.safetensors").unlink()
        text.save_pretrained(base)
    settings = json.loads((folder_of(base, peer, tmp_path) / "config.json").read_text())
    model = adapted(text, target_modules=["q_proj", "down_proj"])
    model.save_pretrained(folder)
    # What LLaVA writes beside an adapter that was trained on a base in 4 bits (QLoRA).
    quantised = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    write_config(folder, settings | {"quantization_config": quantised})
    projector = peer.model.multi_modal_projector
    for parameter in projector.parameters():
        parameter.mul_(1.5)
    beside = {
        f"base_model.model.{name}": tensor * 1.5
        for name, tensor in tensors.items()
        if "mm_projector" in name
    }
    torch.save(beside, folder / "non_lora_trainables.bin")
    save_tower(tmp_path / "tower", peer)
    ours = load(folder, base=base, vision_tower=tmp_path / "tower")
    merged = model.merge_and_unload()
    for name, tensor in merged.model.state_dict().items():
        peer.model.language_model.state_dict()[name].copy_(tensor)
    trace = ours.trace({"image": picture(1, (32, 32)), "text": "What is this?"})
    found = load_pixels(ours)
    ids = torch.from_numpy(trace.token_ids)[None]
    theirs = peer(input_ids=ids, pixel_values=found).logits[0]
    assert_close(torch.from_numpy(trace.logits), theirs, "original llava")
    assert ours.profile.chat_template == "vicuna_v1"


def folder_of(base: Path, peer: Any, tmp_path: Path) -> Path:
    """Return a folder with the config that LLaVA writes beside its adapters."""
    save_original(tmp_path / "config", peer)
    return tmp_path / "config"


def load_pixels(model: visavis.Model) -> torch.Tensor:
    from visavis.processing.resize import process_image

    assert model.processor is not None
    return torch.from_numpy(process_image(picture(1, (32, 32)), model.processor))[None]


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    model = adapted(save_qwen2(folder / "base"), target_modules=["q_proj"])
    model.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def copied(adapter: Path, target: Path) -> Path:
    target.mkdir(exist_ok=True)
    for file in adapter.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return apply


Q = "base_model.model.model.layers.0.self_attn.q_proj"
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "another kind": (lambda f: edit(f, peft_type="IA3"), "sets peft_type to 'IA3'"),
    "another rank": (lambda f: edit(f, r=8), "sets r to 8, expected 4"),
    "transposed": (lambda f: edit(f, fan_in_fan_out=True), "sets fan_in_fan_out to True"),
    "dora without lengths": (lambda f: edit(f, use_dora=True), "has no row lengths"),
    "a pattern that is none": (
        lambda f: edit(f, alpha_pattern={"(a+": 3}),
        "'(.*\\\\.)?((a+)$' is no regular expression",
    ),
    "a pattern without end": (
        lambda f: edit(f, rank_pattern={r"([\w.]+)+!": 3}),
        "take too long to match",
    ),
    "a rank that is no number": (lambda f: edit(f, rank_pattern={"q_proj": "4"}), "sets r to '4'"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "but no weights"),
    "half a pair": (weights(lambda t: t.__delitem__(f"{Q}.lora_B.weight")), "expected lora_A"),
    "a layer that is not there": (
        weights(
            lambda t: t.update(
                {
                    f"{Q.replace('0', '7')}.lora_{x}.weight": t[f"{Q}.lora_{x}.weight"].clone()
                    for x in "AB"
                }
            )
        ),
        "changes model.layers.7.self_attn.q_proj.weight, which its base has not",
    ),
    "another width": (
        weights(lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 7)})),
        "of shape (32, 7), but its base has (32, 32)",
    ),
    "an embedding's": (
        weights(
            lambda t: t.update(
                {
                    "base_model.model.model.embed_tokens.lora_embedding_A": t[
                        f"{Q}.lora_A.weight"
                    ].clone()
                }
            )
        ),
        "adapters of embeddings",
    ),
    "single rows of the token embedding": (
        lambda folder: edit(folder, trainable_token_indices=[3, 5]),
        "sets trainable_token_indices to [3, 5]",
    ),
    "rows of several embeddings": (
        lambda folder: edit(folder, trainable_token_indices={"embed_tokens": [3]}),
        "Merge the adapter with PEFT",
    ),
    "a tensor that the model has not": (
        weights(lambda t: t.update({"base_model.model.extra.weight": torch.ones(3)})),
        "unexpected extra.weight",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    damage, expected = DAMAGE[name]
    damage(folder := copied(adapter, tmp_path / "adapter"))
    with pytest.raises(CheckpointError) as raised:
        load(folder, base=base)
    assert expected in str(raised.value)


def test_a_base_that_is_not_here(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copied(pair[1], tmp_path / "adapter")
    edit(folder, base_model_name_or_path="someone/model")
    with pytest.raises(CheckpointError, match="adapter of 'someone/model', which is no folder"):
        load(folder)
    edit(folder, base_model_name_or_path=".")
    with pytest.raises(CheckpointError, match="more than 8 adapters stand on one another"):
        load(folder)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load(folder, base=tmp_path)
    with pytest.raises(InputError, match="vision_tower was given"):
        load(folder, base=pair[0], vision_tower=tmp_path)


def test_a_quantised_base(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = copied(pair[0], tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"is torch\.int8 in its base"):
        load(pair[1], base=base)


def test_the_adapters_own_tokenizer_goes_first(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copied(pair[1], tmp_path / "adapter")
    tokenizer = fast_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}!"
    tokenizer.save_pretrained(folder)
    model = load(folder, base=pair[0])
    assert model.tokenizer.decode(model.trace("Hi").token_ids.tolist()) == "Hi!"
