"""Every system on one mixed batch: each item's vector is the one it has alone, whatever stands
beside it, and a chat decoded with a cache is the one decoded without.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import visavis
from tests.checkpoints.anyres_files import save_next, save_onevision
from tests.checkpoints.idefics3_files import save_idefics3
from tests.checkpoints.internvl_files import save_internvl
from tests.checkpoints.llava_files import save_original, save_tower, tiny_peer
from tests.checkpoints.onevision15_files import save_onevision15
from tests.checkpoints.phi3v_files import save_phi3v, tiny_tower
from tests.checkpoints.tinyllava_files import Peer, save_repository
from tests.checkpoints.transformers_files import save_llava
from tests.fakes import picture, write_tiny_checkpoint
from tests.mmproj_files import compose, tiny_llama
from tests.parity.qwen2_vl_files import save_qwen2_5_vl, save_qwen2_vl, save_qwen3_vl
from tests.parity.test_llava_original_anyres import VARIANTS
from tests.parity.test_llava_original_anyres import save as save_anyres
from tests.processing.test_pdf import pdf_bytes
from visavis.checkpoints.gguf.export import write_gguf
from visavis.generate.engine import generate
from visavis.inputs import Document, Image, Prompt, Text, Video
from visavis.processing.feature_cache import FeatureCache
from visavis.processing.images import ContentHasher
from visavis.processing.pdf import expand

pytest.importorskip("pypdfium2")
pytestmark = pytest.mark.parity
__all__ = ["tiny_tower"]  # a fixture that Phi-3.5-vision's files need

FLAT = 1e-5  # absolute, of unit vectors in float32
NEW_TOKENS = 6


def load(folder: Path, **settings: Any) -> visavis.Model:
    return visavis.load(folder, precision="f32", device="cpu", **settings)


def original(folder: Path) -> visavis.Model:
    save_original(folder, tiny_peer(), add_time_instruction=True)
    save_tower(folder / "vision_tower", peer=tiny_peer())
    return load(folder)


def saved(save: Callable[[Path], Any], **settings: Any) -> Callable[[Path], visavis.Model]:
    def build(folder: Path) -> visavis.Model:
        save(folder)
        return load(folder, **settings)

    return build


def gguf(folder: Path) -> visavis.Model:
    composed = compose(tiny_llama(folder), "CLIP, mlp2x")
    model, mmproj = write_gguf(composed, folder / "ours", kind="F32")
    return load(model, vision_tower=mmproj)


def text_gguf(folder: Path) -> visavis.Model:
    tiny_llama(folder)
    return load(folder / "llama.gguf", chat_template="vicuna_v1")


SYSTEMS: dict[str, Callable[[Path], visavis.Model]] = {
    "native": saved(write_tiny_checkpoint),
    "llava": saved(save_llava),
    "llava, original": original,
    "llava, original, anyres_max": saved(
        lambda folder: save_anyres(folder, **VARIANTS["anyres_max_2, qwen2, siglip, range"]())
    ),
    "llava_next": saved(save_next),
    "llava_onevision": saved(save_onevision),
    "llave": saved(save_onevision, profile="llave"),
    "qwen2_vl": saved(save_qwen2_vl),
    "qwen2_5_vl": saved(save_qwen2_5_vl),
    "qwen3_vl": saved(save_qwen3_vl),
    "vlm2vec-v2": saved(save_qwen2_vl, profile="vlm2vec-v2"),
    "phi3_v": saved(save_phi3v),
    "internvl": saved(save_internvl),
    "llava_onevision1_5": saved(save_onevision15),
    "idefics3": saved(save_idefics3),
    "smolvlm": saved(lambda folder: save_idefics3(folder, smolvlm=True, scale=3)),
    "tinyllava": saved(lambda folder: save_repository(folder, Peer()), chat_template="vicuna_v1"),
    "gguf": text_gguf,
    "gguf with mmproj": gguf,
}
NO_PICTURES, NO_VIDEOS = {"gguf"}, {"phi3_v", "idefics3"}
NO_PAGES = {"vlm2vec-v2"}  # which it does not make smaller: too many tokens for a tiny context


def items_for(name: str) -> dict[str, Any]:
    """Return one item of each kind that a system takes."""
    one, two, three = picture(1, (90, 41)), picture(2, (30, 70)), picture(3, (33, 33))
    clip, pages = Video([picture(n, (50, 41)) for n in range(5)], frames=3), Document(pdf_bytes(2))
    items: dict[str, Any] = {"word": "a", "text": "two cats on a sofa, and a third one below it"}
    if name not in NO_PICTURES:
        items |= {
            "picture": one,
            "picture and text": {"image": two, "text": "what is it?"},
            "pictures": {"image": [one, two, three], "text": "which one?"},
            "interleaved": [Text("from"), Image(three), Text("to"), Image(one), Text("?")],
            "the same picture": {"text": "again", "image": two},
        }
    if name not in NO_PICTURES | NO_PAGES:
        items["pages"] = {"document": pages, "text": "what does it say?"}
    if name not in NO_PICTURES | NO_VIDEOS:
        items["video"] = {"video": clip, "text": "what happens?"}
        last = [] if name in NO_PAGES else [pages]
        items["all"] = [Image(two), Text("in"), clip, Text("or"), Image(one), *last, Text("?")]
    return items


@pytest.fixture(scope="module")
def models() -> dict[str, visavis.Model]:
    return {}


@pytest.fixture(params=SYSTEMS)
def system(
    request: pytest.FixtureRequest, models: dict[str, visavis.Model], tmp_path: Path
) -> tuple[str, visavis.Model]:
    """A system by name, loaded once for all tests."""
    name = request.param
    if name not in models:
        models[name] = SYSTEMS[name](tmp_path)
    return name, models[name]


def test_one_batch_of_all_kinds(system: tuple[str, visavis.Model]) -> None:
    name, model = system
    items = items_for(name)
    alone = {}
    for kind, item in items.items():
        model.image_encoder.cache = FeatureCache()
        alone[kind] = model.embed([item])[0]
    assert len({vector.tobytes() for vector in alone.values()}) == len(items), "some are the same"
    for seed, batch_tokens in ((0, 10_000), (1, 200)):
        kinds = random.Random(seed).sample(list(items), len(items))
        model.image_encoder.cache = FeatureCache()
        vectors = model.embed([items[kind] for kind in kinds], batch_tokens=batch_tokens)
        for kind, vector in zip(kinds, vectors, strict=True):
            np.testing.assert_allclose(vector, alone[kind], atol=FLAT, err_msg=f"{name}: {kind}")


def test_chat_with_a_cache_and_without(system: tuple[str, visavis.Model]) -> None:
    name, model = system
    for kind, item in items_for(name).items():
        prompt = ContentHasher().identify(expand(Prompt.of(item)))
        batch = model.image_encoder.pack([model.encoder.chat(prompt)])
        tokens = generate(
            model.vlm,
            batch,
            lambda logits: int(logits.argmax()),
            max_new_tokens=NEW_TOKENS,
            stop_ids=frozenset(),
        )
        assert list(tokens) == without_cache(model, prompt), f"{name}: {kind}"


@torch.inference_mode()
def without_cache(model: visavis.Model, prompt: Prompt) -> list[int]:
    """Return the likeliest tokens, the whole sequence read again for each."""
    encoded = model.encoder.chat(prompt)
    found: list[int] = []
    for _ in range(NEW_TOKENS):
        hidden = model.vlm(model.image_encoder.pack([encoded]))[-1]
        found.append(int(model.vlm.decoder.logits(hidden[-1:]).argmax()))
        encoded.add(found[-1:])
        if encoded.positions is not None:
            following = encoded.positions.max() + 1
            encoded.positions = torch.cat((encoded.positions, following.expand(3, 1)), 1)
    return found
