"""Qwen2-VL's files as they are published, adapters on them, and VLM2Vec's way to embed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import visavis
from tests.parity.peers import assert_close
from tests.parity.qwen2_vl_files import IMAGE, noise, peer_inputs, save_qwen2_vl
from visavis.checkpoints.native import save_native
from visavis.checkpoints.transformers.weights import write
from visavis.errors import CheckpointError, UnknownNameError
from visavis.processing.config import QWEN2_VL_SIZES
from visavis.processing.qwen2_vl import Qwen2VLProcessor

peft = pytest.importorskip("peft", reason="needs peft (visavis[dev])")
pytestmark = pytest.mark.parity

# VLM2Vec's, of all the models it trains: what is not there is left out.
PARTS = ("qkv", "o", "gate_up", "down", "k", "q", "out", "v", "gate", "up")
TARGETS = [f"{part}_proj" for part in PARTS]


def load(folder: Path, **settings: Any) -> visavis.Model:
    return visavis.load(folder, precision="f32", device="cpu", **settings)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def as_published(config: dict[str, Any]) -> None:
    """Bring a config.json to the form of 2024: the language model's settings at the top."""
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope["rope_theta"]
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    vision = config["vision_config"]
    vision.pop("rope_parameters")
    vision.update(model_type="qwen2_vl", in_chans=vision.pop("in_channels"))
    tied = config["tie_word_embeddings"]
    config.update(text | {"model_type": "qwen2_vl", "tie_word_embeddings": tied})


@pytest.mark.parametrize("tied", [False, True])
def test_both_generations_of_files(tied: bool, tmp_path: Path) -> None:
    save_qwen2_vl(tmp_path, tie_word_embeddings=tied)
    model = load(tmp_path)
    state = model.vlm.state_dict()
    weights = load_file(tmp_path / "model.safetensors")
    newer = {"visual.": "model.visual.", "model.": "model.language_model."}
    renamed = {}
    for name, tensor in weights.items():
        part = next((part for part in newer if name.startswith(part)), "")
        renamed[newer.get(part, "") + name.removeprefix(part)] = tensor
    assert any(name.startswith("model.visual.blocks") for name in renamed)
    save_file(renamed, tmp_path / "model.safetensors")
    edit(tmp_path / "config.json", as_published)
    again = load(tmp_path)
    assert again.vlm.config == model.vlm.config and again.processor == model.processor
    assert all(torch.equal(state[name], tensor) for name, tensor in again.vlm.state_dict().items())
    written = write(json.loads((tmp_path / "config.json").read_text()), state)
    assert written["visual.patch_embed.proj.weight"].shape == (48, 3, 2, 4, 4)
    assert written.keys() == weights.keys() - ({"lm_head.weight"} if tied else set())


@torch.no_grad()
def test_a_dora_adapter_of_vlm2vec(tmp_path: Path) -> None:
    """Merged it equals PEFT's; embedded as VLM2Vec does, the peer's last state, positions flat."""
    peer = save_qwen2_vl(tmp_path / "base")
    config = peft.LoraConfig(
        r=8,
        lora_alpha=64,
        lora_dropout=0.1,
        target_modules=TARGETS,
        init_lora_weights="gaussian",
        use_dora=True,
    )
    model = peft.get_peft_model(peer, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            generator = torch.Generator().manual_seed(len(name))
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "adapter")
    settings: dict[str, Any] = {"base": tmp_path / "base"}
    ours = load(tmp_path / "adapter", **settings)
    plain = load(tmp_path / "base")
    prompt = {"image": noise((30, 41), 1), "text": "What is it?"}
    trace = ours.trace(prompt)
    assert ours.processor is not None
    patches, shape = Qwen2VLProcessor(ours.processor).pixels(noise((30, 41), 1))
    ids, visuals = trace.token_ids.tolist(), [(torch.from_numpy(patches), shape)]
    expected = model(**peer_inputs(ids, visuals)).logits[0]
    assert_close(torch.from_numpy(trace.logits), expected, "merged DoRA")
    assert abs(trace.logits - plain.trace(prompt).logits).max() > 0.1, "the adapter does nothing"

    embedder = load(tmp_path / "adapter", profile="vlm2vec-v2", **settings)
    assert embedder.fingerprint != ours.fingerprint
    assert embedder.processor is not None and embedder.processor.patches is not None
    assert embedder.processor.patches.extreme == "square"
    patches, shape = Qwen2VLProcessor(embedder.processor).pixels(noise((30, 41), 1))
    visuals = [(torch.from_numpy(patches), shape)]
    inst = "Represent the given image with the following question:"
    items: list[tuple[Any, str | None, str]] = [
        (prompt, inst, f" {inst} What is it?"),
        ({"image": prompt["image"]}, "Represent the given image.", " Represent the given image."),
        ("a cat", "Find me:", "Find me: a cat"),
        ("a cat", None, "a cat"),
    ]
    for item, instruction, text in items:
        shown = visuals if isinstance(item, dict) else []
        ids = [IMAGE] * sum(len(one) // 4 for one, _ in shown)
        ids += embedder.tokenizer.encode(text, add_special_tokens=False).ids
        found = model(**peer_inputs(ids, shown, grid=False), output_hidden_states=True)
        last = torch.nn.functional.normalize(found.hidden_states[-1][0, -1], dim=0)
        vector = embedder.embed([item], instruction=instruction)[0]
        assert_close(torch.from_numpy(vector), last, f"embedded: {text}")
    vectors = [one.embed([prompt], instruction=inst)[0] for one in (embedder, ours)]
    assert abs(vectors[0] - vectors[1]).max() > 0.01, "positions make no difference"
    assert (
        embedder.chat("What is it?", max_new_tokens=4).text
        == ours.chat("What is it?", max_new_tokens=4).text
    )


def test_profiles_by_name(tmp_path: Path) -> None:
    save_qwen2_vl(tmp_path)
    first = load(tmp_path, profile="vlm2vec-v1")
    assert first.processor is not None and first.processor.patches is not None
    assert first.processor.video is not None and first.processor.video.frames == 8
    assert first.processor.patches.square == QWEN2_VL_SIZES["vlm2vec-v1"]["square"] == 1344
    assert first.profile.instructed("Find:", "x") == "Find: x\n"
    assert first.profile.instructed("Represent it.", "") == "Represent it.\n"
    assert first.profile.jinja and first.profile.embed_image_end == "\n"
    with pytest.raises(UnknownNameError, match="vlm2vec-v2"):
        load(tmp_path, profile="vlm2vec")


def test_a_folder_of_our_own_needs_no_profile(tmp_path: Path) -> None:
    save_qwen2_vl(tmp_path / "theirs")
    model = load(tmp_path / "theirs", profile="vlm2vec-v2")
    save_native(
        tmp_path / "ours",
        name="ours",
        config=model.vlm.config,
        tensors=model.vlm.state_dict(),
        profile=model.profile,
        processor=model.processor,
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "ours" / name).write_bytes((tmp_path / "theirs" / name).read_bytes())
    again, items = load(tmp_path / "ours"), [{"image": noise((40, 50), 1), "text": "red"}]
    assert again.vlm.config == model.vlm.config and again.processor == model.processor
    assert (again.embed(items) == model.embed(items)).all()


DAMAGE: dict[str, tuple[str, Callable[[dict[str, Any]], None], str]] = {
    "sections": (
        "config.json",
        lambda c: c["text_config"]["rope_parameters"].update(mrope_section=[2, 3, 4]),
        r"mrope_section to \[2, 3, 4\], expected three, 8 in all",
    ),
    "another stretch": (
        "config.json",
        lambda c: c["text_config"]["rope_parameters"].update(rope_type="yarn"),
        "rope_type to 'yarn', expected 'mrope'",
    ),
    "merger's width": (
        "config.json",
        lambda c: c["vision_config"].update(hidden_size=64),
        "vision_config.hidden_size to 64, expected 32",
    ),
    "heads": (
        "config.json",
        lambda c: c["vision_config"].update(num_heads=5),
        "embed_dim to 48, expected a multiple of 4 for each of 5 heads",
    ),
    "channels": ("config.json", lambda c: c["vision_config"].update(in_channels=1), "expected 3"),
    "placeholder": (
        "config.json",
        lambda c: c.update(video_token_id=999),
        "video_token_id to 999, expected 0 to 263",
    ),
    "patches of another tower": (
        "preprocessor_config.json",
        lambda c: c.update(patch_size=14),
        "patch_size to 14, expected 4, as the vision tower",
    ),
    "bounds": (
        "preprocessor_config.json",
        lambda c: c.update(max_pixels=100),
        "max_pixels to 100, expected at least 256",
    ),
    "another processor": (
        "preprocessor_config.json",
        lambda c: c.update(image_processor_type="CLIPImageProcessor"),
        "image_processor_type to 'CLIPImageProcessor'",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_does_not_fit_is_named(name: str, tmp_path: Path) -> None:
    save_qwen2_vl(tmp_path)
    file, change, message = DAMAGE[name]
    edit(tmp_path / file, change)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_videos_have_bounds_of_their_own(tmp_path: Path) -> None:
    save_qwen2_vl(tmp_path)
    shared = load(tmp_path).processor
    assert shared is not None and shared.patches is not None
    assert shared.patches.bounds(4) == shared.patches.bounds(0) == (256, 1600)
    edit(tmp_path / "preprocessor_config.json", lambda c: c.update(max_pixels=12845056))
    large = load(tmp_path).processor
    assert large is not None and large.patches is not None
    assert large.patches.bounds(4) == (256, 768 * 28 * 28)
    settings = {"size": {"shortest_edge": 300, "longest_edge": 900}}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(settings))
    own = load(tmp_path).processor
    assert own is not None and own.patches is not None
    assert own.patches.bounds(4) == (300, 900)
