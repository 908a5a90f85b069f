"""LLaVAs of our own making as GGUF and mmproj: read again by us, and seen through by llama.cpp.

Pictures come in the size of the tower, so that nobody resizes. llama.cpp puts the class token
behind the patches, gives each patch the position of the one before it, and drops the first patch
instead of the class token; towers with a class token are therefore compared twice: that the file is
right, with the same mistake made here, and that the mistake is all that differs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as pil
from torch import Tensor

from tests.llamacpp import llama_cpp
from tests.mmproj_files import SIZE, VARIANTS, compose, rewrite, tiny_llama
from tests.parity.peers import assert_close
from visavis.api import Model
from visavis.checkpoints.checkpoint import Checkpoint
from visavis.checkpoints.gguf.export import write_gguf
from visavis.checkpoints.gguf.mmproj import VISION
from visavis.checkpoints.gguf.reader import open_gguf
from visavis.checkpoints.load import load_checkpoint
from visavis.generate.engine import generate
from visavis.generate.sampling import Sampler, Sampling
from visavis.model.batch import PackedBatch
from visavis.model.config import ViTConfig
from visavis.model.image_input import ImageInput
from visavis.model.image_tokens import tokens_per_view
from visavis.model.vision.vit import ViT
from visavis.processing.chat_template import Encoded
from visavis.processing.collate import pack
from visavis.processing.prompt_config import PromptConfig
from visavis.processing.resize import process_image

pytestmark = pytest.mark.parity

BEFORE, AFTER = "ab word12 q", "what?"
PICTURE = pil.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8))


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_llama(tmp_path_factory.mktemp("llm"))


def batch_of(loaded: Checkpoint, picture: pil.Image = PICTURE) -> PackedBatch:
    """Return the picture between two texts."""
    assert loaded.processor is not None
    encoded = Encoded()
    encoded.add(loaded.tokenizer.encode(BEFORE, add_special_tokens=False).ids)
    encoded.add_image(loaded.vlm.config.image_token_id, tokens_per_view(loaded.vlm.config))
    encoded.add(loaded.tokenizer.encode(AFTER, add_special_tokens=False).ids)
    batch = pack([encoded])
    pixels = torch.from_numpy(process_image(picture, loaded.processor))
    batch.visuals = (ImageInput(pixels[None]),)
    return batch


@torch.no_grad()
def read(loaded: Checkpoint) -> tuple[Tensor, Tensor]:
    """Return the final hidden states and logits of the picture and its texts."""
    hidden = loaded.vlm(batch_of(loaded))[-1]
    return hidden, loaded.vlm.decoder.logits(hidden)


@torch.no_grad()
def greedy(loaded: Checkpoint, length: int) -> list[int]:
    batch = loaded.vlm.resolve_images(batch_of(loaded))
    sampler = Sampler(Sampling())
    stop = frozenset(loaded.specials.eot_ids)
    return list(generate(loaded.vlm, batch, sampler, max_new_tokens=length, stop_ids=stop))


def misplace_class_token(loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a tower make llama.cpp's mistake."""
    tower = loaded.vlm.tower
    assert isinstance(tower, ViT) and tower.class_token is not None

    def embed(pixels: Tensor) -> Tensor:
        x = tower.patch(pixels).flatten(2).transpose(1, 2)
        x = torch.cat((x, tower.class_token.expand(len(x), 1, -1)), 1) + tower.positions
        return x if tower.pre_norm is None else tower.pre_norm(x)

    monkeypatch.setattr(tower, "embed", embed)


def distance(loaded: Checkpoint, found: dict[int, float]) -> float:
    ours = read(loaded)[1][-1].log_softmax(-1)
    return max(abs(ours[token].item() - value) for token, value in found.items())


@pytest.mark.parametrize("name", VARIANTS)
def test_what_was_written_is_read_and_seen_by_both(
    name: str, language_model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = compose(language_model, name)
    model, mmproj = write_gguf(loaded, tmp_path, kind="F32")
    again = load_checkpoint(model, vision_tower=mmproj, precision="f32", device="cpu")
    assert_close(read(again)[1], read(loaded)[1], name)
    tower = loaded.vlm.config.tower
    assert isinstance(tower, ViTConfig) and isinstance(again.vlm.config.tower, ViTConfig)
    assert again.vlm.config.tower == replace(
        tower,
        num_layers=2,
        post_norm=False,
        layer_scale=False,
    )
    assert again.vlm.config.connector == loaded.vlm.config.connector
    assert again.processor == loaded.processor and again.profile == loaded.profile
    with llama_cpp(model, mmproj, context_length=256) as server:
        prompt = server.with_pictures(f"{BEFORE}<image>{AFTER}", [PICTURE])
        found = server.next_token(prompt)
        request = {"prompt": prompt, "n_predict": 16, "temperature": 0, "return_tokens": True}
        tokens = server.post("/completion", request | {"cache_prompt": False})["tokens"]
    if tower.class_token:
        right = distance(again, found)
        misplace_class_token(again, monkeypatch)
        assert right > 0.02, "llama.cpp puts the class token first now: compare without the mistake"
    worst = distance(again, found)
    print(f"{name}: log probabilities differ by {worst:.1e} from llama.cpp's")
    assert worst < 0.01
    ended = tokens[-1] in again.specials.eot_ids
    assert greedy(again, 16) == (tokens[:-1] if ended else tokens)


def test_embeddings_with_pictures_are_llama_cpps(
    language_model: Checkpoint, tmp_path: Path
) -> None:
    """Pooled as the file says. Its mean is of the words after the last picture only: llama.cpp
    pools what it computes at once, and pictures are computed apart."""
    for pooling in ("last", "mean"):
        loaded = compose(language_model, "SigLIP, mlp2x")
        loaded.profile = PromptConfig(chat_template="qwen_1_5", pooling=pooling)
        model, mmproj = write_gguf(loaded, tmp_path / pooling, kind="F16")
        with llama_cpp(model, mmproj, context_length=256, embedding=True) as server:
            content = server.with_pictures(f"{BEFORE}<image>{AFTER}", [PICTURE])
            found = torch.tensor(server.post("/embedding", {"content": content})[0]["embedding"])
        again = load_checkpoint(tmp_path / pooling, precision="f32", device="cpu")
        hidden, words = read(again)[0], len(again.tokenizer.encode(AFTER).ids)
        ours = hidden[-1] if pooling == "last" else hidden[-words:].mean(0)
        cosine = torch.cosine_similarity(ours, found.flatten(), dim=0).item()
        print(f"{pooling}: the cosine with llama.cpp's embedding is {cosine:.6f}")
        assert again.profile.pooling == pooling and cosine >= 0.9999


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_smaller_types(kind: str, language_model: Checkpoint, tmp_path: Path) -> None:
    loaded = compose(language_model, "SigLIP, mlp2x")
    files = write_gguf(loaded, tmp_path / "m.gguf", kind=kind)
    assert [file.name for file in files] == ["m.gguf", "mmproj-m.gguf"]
    tensors = open_gguf(files[1]).tensors
    matrices = "Q8_0" if kind == "Q8_0" else "F16"
    assert tensors["v.blk.0.attn_q.weight"].type == tensors["mm.2.weight"].type == matrices
    assert tensors["v.patch_embd.weight"].type == "F16"
    assert tensors["v.position_embd.weight"].type == tensors["mm.0.bias"].type == "F32"
    again = load_checkpoint(files[0], vision_tower=files[1], precision="f32", device="cpu")
    with llama_cpp(*files, context_length=256) as server:
        found = server.next_token(server.with_pictures(f"{BEFORE}<image>{AFTER}", [PICTURE]))
    assert distance(again, found) < 0.1
    cosine = torch.cosine_similarity(read(again)[0][-1], read(loaded)[0][-1], dim=0).item()
    assert cosine > {"F16": 0.9999, "Q8_0": 0.995, "Q4_0": 0.8}[kind]


def test_a_folder_of_the_two_chats_and_embeds(language_model: Checkpoint, tmp_path: Path) -> None:
    loaded = compose(language_model, "CLIP, mlp2x")
    write_gguf(loaded, tmp_path, kind="F32")
    ours, again = (
        Model.of(loaded),
        Model.of(load_checkpoint(tmp_path, precision="f32", device="cpu")),
    )
    picture = pil.new("RGB", (50, 30), (200, 40, 40))
    answers = [model.chat("word3?", [picture], max_new_tokens=12).text for model in (ours, again)]
    assert answers[0] == answers[1] != ""
    vectors = [model.embed([picture, "word5"]) for model in (ours, again)]
    assert np.abs(vectors[0] - vectors[1]).max() < 1e-5


def test_llama_cpp_chats_with_the_same_words(language_model: Checkpoint, tmp_path: Path) -> None:
    """What its server makes of our jinja is what we write, LLaVA's newline after pictures too."""
    loaded = compose(language_model, "SigLIP, mlp2x")
    files = write_gguf(loaded, tmp_path, kind="F32")
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    message = {"role": "user", "content": [image, {"type": "text", "text": "word3?"}]}
    with llama_cpp(*files, context_length=256) as server:
        prompt = server.post("/apply-template", {"messages": [message]})["prompt"]
        marker = server.post("/props", None)["media_marker"]
    assert prompt == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"{marker}\nword3?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_files_of_llama_cpps_first_converter(
    language_model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No feature layer, one block cut off before, and the feed-forward matrices swapped.

    llama.cpp then leaves out one block more, which was trained; we do not.
    """
    loaded = compose(language_model, "SigLIP, mlp2x")
    model, mmproj = write_gguf(loaded, tmp_path, kind="F32")
    names = {}
    for name in open_gguf(mmproj).tensors:
        if "ffn_" in name:
            other = name.replace("up", "DOWN").replace("down", "up").replace("DOWN", "down")
            names[name] = other
    old = rewrite(
        mmproj,
        tmp_path / "old.gguf",
        {
            VISION: None,
            "clip.vision.feature_layer": None,
            "clip.vision.feed_forward_length": 0,
            "clip.vision.mm_projector_type": None,
            "clip.vision.mm_patch_merge_type": None,
        },
        names,
    )
    again = load_checkpoint(model, vision_tower=old, precision="f32", device="cpu")
    assert_close(read(again)[1], read(loaded)[1], "old names")
    assert again.processor is not None and loaded.processor is not None
    assert again.processor.resize == "pad" and again.processor.mean == pytest.approx(
        loaded.processor.mean
    )
    with llama_cpp(model, old, context_length=256) as server:
        found = server.next_token(server.with_pictures(f"{BEFORE}<image>{AFTER}", [PICTURE]))
    assert distance(again, found) > 0.1
    monkeypatch.setattr(again.vlm, "config", replace(again.vlm.config, select_layer=-2))
    assert distance(again, found) < 0.01
