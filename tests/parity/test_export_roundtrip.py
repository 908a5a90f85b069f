"""A model that goes through every layout comes back as it was: tensors bit for bit, in float32.

transformers -> native -> LLaVA's original -> native, and the same logits at every stop; the
original layout is also read by what wrote it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig, Qwen2Config, SiglipVisionConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import visavis
from tests.checkpoints.llava_files import save_original, save_tower, tiny_peer
from tests.checkpoints.transformers_files import IMAGE_SIZE, TEXT, VISION, save_llava
from tests.fakes import byte_tokenizer, picture
from tests.parity import test_llava_original_anyres as anyres
from tests.parity.peers import TOLERANCE
from visavis.checkpoints.checkpoint import Checkpoint, whole_state, write_tensors
from visavis.checkpoints.llava.export import write_llava
from visavis.checkpoints.load import load_checkpoint
from visavis.checkpoints.native import write_native
from visavis.checkpoints.tensor_files import read_tensors, weight_files
from visavis.checkpoints.transformers.export import write_transformers
from visavis.errors import CheckpointError
from visavis.model.config import ConnectorConfig, DecoderConfig, ViTConfig, VLMConfig
from visavis.model.vlm import VLM
from visavis.processing.config import ImageProcessorConfig
from visavis.processing.prompt_config import PromptConfig
from visavis.processing.tokenizer import SpecialTokens

pytestmark = pytest.mark.parity

PROMPT = {"image": [picture(1), picture(2, (30, 70))], "text": "What is this?"}
Write = Callable[..., Any]


def through(folder: Path, write: Write, loaded: Checkpoint) -> Checkpoint:
    """Write a model and load what was written."""
    folder.mkdir()
    write(loaded, folder)
    return load_checkpoint(folder, precision="f32", device="cpu")


def assert_same(first: Checkpoint, second: Checkpoint) -> None:
    ours, theirs = whole_state(first.vlm), whole_state(second.vlm)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert first.vlm.config.decoder == second.vlm.config.decoder
    assert first.specials == second.specials


def logits(loaded: Checkpoint) -> np.ndarray:
    return visavis.Model.of(loaded).trace(PROMPT).logits


SOURCES: dict[str, Callable[[], dict[str, Any]]] = {
    "clip, qwen2": dict,
    "clip, llama, tied": lambda: {"text": LlamaConfig(**TEXT, tie_word_embeddings=True)},
    "siglip, mistral": lambda: {
        "image_processor": SiglipImageProcessorPil(size=dict.fromkeys(("height", "width"), 32)),
        "vision": SiglipVisionConfig(**VISION),
        "text": MistralConfig(**TEXT),
        "select": "full",
    },
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_layout_in_turn(name: str, tmp_path: Path) -> None:
    save_llava(tmp_path / "peer", **SOURCES[name]())
    if name.startswith("siglip"):  # LLaVA cuts off SigLIP's last block, so the peer has to too
        config = tmp_path / "peer" / "config.json"
        config.write_text(config.read_text().replace('_layer": -2', '_layer": -1'))
    first = load_checkpoint(tmp_path / "peer", precision="f32", device="cpu")
    found, expected = first, logits(first)
    for place, write in (
        ("transformers", write_transformers),
        ("native", write_native),
        ("llava", write_llava),
        ("again", write_native),
    ):
        found = through(tmp_path / place, write, found)
        assert_same(first, found)
        if place in ("transformers", "native"):
            assert np.abs(logits(found) - expected).max() <= TOLERANCE
            assert found.profile.jinja == first.profile.jinja


@pytest.mark.parametrize("aspect", ["pad", "square"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_original_layout_comes_back(aspect: str, tied: bool, tmp_path: Path) -> None:
    text = Qwen2Config(**TEXT, tie_word_embeddings=tied) if tied else LlamaConfig(**TEXT)
    peer = tiny_peer(text)
    save_original(tmp_path / "in", peer, image_aspect_ratio=aspect)
    save_tower(tmp_path / "in" / "vision_tower", peer)
    settings = {"precision": "f32", "device": "cpu", "chat_template": "llava_v1"}
    first = load_checkpoint(tmp_path / "in", **settings)
    second = through(tmp_path / "out", write_llava, first)
    assert_same(first, second)
    assert second.vlm.config == first.vlm.config and second.processor == first.processor
    second.profile = first.profile
    assert np.array_equal(logits(first), logits(second))


ANYRES = {  # what transformers has too
    "anyres, vicuna",
    "anyres, mistral, listed in text",
    "anyres_max_2, qwen2, siglip, range",
}


@pytest.mark.parametrize("name", anyres.VARIANTS)
def test_the_original_layout_with_tiles_comes_back(name: str, tmp_path: Path) -> None:
    anyres.save(tmp_path / "in", **anyres.VARIANTS[name]())
    first = load_checkpoint(
        tmp_path / "in", precision="f32", device="cpu", chat_template="vicuna_v1"
    )
    prompt = {"image": picture(1, (90, 61)), "text": "What is this?"}
    expected = visavis.Model.of(first).trace(prompt)
    second = through(tmp_path / "llava", write_llava, first)
    assert_same(first, second)
    assert second.vlm.config == first.vlm.config and second.processor == first.processor
    second.profile = first.profile
    assert np.array_equal(visavis.Model.of(second).trace(prompt).logits, expected.logits)
    if name not in ANYRES:
        with pytest.raises(CheckpointError, match="cannot be written in this layout"):
            through(tmp_path / "transformers", write_transformers, first)
        return
    third = visavis.Model.of(through(tmp_path / "transformers", write_transformers, first))
    found = third.trace(prompt)
    assert [n for _, n in found.image_slots] == [n for _, n in expected.image_slots]
    rows = expected.logits.shape[1]
    assert np.abs(found.logits[:, :rows] - expected.logits).max() <= TOLERANCE


def test_shards_are_the_whole(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(i + 1, 50) for i in range(8)}
    paths = write_tensors(tmp_path, tensors, max_shard_bytes=2500)
    assert len(paths) > 2 and paths[0].name == f"model-00001-of-{len(paths):05}.safetensors"
    assert weight_files(tmp_path) == paths
    found = read_tensors(paths)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert all(path.stat().st_size < 2500 + 1000 for path in paths)


@st.composite
def models(draw: st.DrawFn) -> VLMConfig:
    """Any small model that stock transformers and LLaVA's original layout both have."""
    kv_heads, tower_heads = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
    qwen = draw(st.booleans())
    siglip = draw(st.booleans())
    vocab = byte_tokenizer().get_vocab_size()
    tower = ViTConfig(
        image_size=IMAGE_SIZE,
        patch_size=draw(st.sampled_from([8, 16])),
        width=12 * tower_heads,
        num_layers=draw(st.integers(2, 3)),
        num_heads=tower_heads,
        ffn_width=draw(st.integers(8, 20)),
        activation=draw(st.sampled_from(["gelu_tanh", "quick_gelu"])),
        norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        class_token=not siglip,
        patch_bias=siglip,
        pre_norm=not siglip,
    )
    width = 8 * draw(st.sampled_from([2, 4]))
    return VLMConfig(
        decoder=DecoderConfig(
            vocab_size=vocab + draw(st.sampled_from([0, 5])),
            width=width,
            num_layers=draw(st.integers(1, 2)),
            num_heads=kv_heads * 2,
            num_kv_heads=kv_heads,
            head_dim=draw(st.sampled_from([4, 8])),
            ffn_width=draw(st.integers(8, 40)),
            context_length=256,
            norm_eps=1e-5,
            activation=draw(st.sampled_from(["silu", "gelu"])),
            qkv_bias=qwen,
            tied_head=draw(st.booleans()),
            sliding_window=0 if qwen else draw(st.sampled_from([0, 16])),
            rope_base=draw(st.sampled_from([1e4, 1e6])),
        ),
        tower=tower,
        connector=ConnectorConfig("mlp", tower.width, width, depth=2),
        image_token_id=vocab - 1,
        select_layer=-1 if siglip else draw(st.sampled_from([-1, -2])),
        select_feature="class_patch" if siglip else draw(st.sampled_from(["patch", "class_patch"])),
    )


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=models(), resize=st.sampled_from(["pad", "native"]), seed=st.integers(0, 99))
def test_any_model(
    tmp_path_factory: pytest.TempPathFactory, config: VLMConfig, resize: str, seed: int
) -> None:
    torch.manual_seed(seed)
    vlm = VLM(config)
    for parameter in vlm.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokenizer = byte_tokenizer()
    by_text = {t.content: n for n, t in tokenizer.get_added_tokens_decoder().items()}
    own = "crop" if config.tower and config.tower.class_token else "squash"
    first = Checkpoint(
        name="any",
        vlm=vlm.requires_grad_(False).eval(),
        tokenizer=tokenizer,
        specials=SpecialTokens(None, 258, (258, 256), 258, False, by_text),
        profile=PromptConfig(chat_template="qwen_1_5"),
        processor=ImageProcessorConfig(
            IMAGE_SIZE, own if resize == "native" else "pad", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
        ),
        fingerprint="",
    )
    folder, found = tmp_path_factory.mktemp("any"), first
    for number, write in enumerate((write_transformers, write_native, write_llava, write_native)):
        found = through(folder / str(number), write, found)
        assert_same(first, found)
        assert found.processor == first.processor
