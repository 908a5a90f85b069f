"""LLaVE: a OneVision in the original layout that was trained to embed; its prompt and pooled token
against the formulas of its code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, SiglipVisionConfig

import visavis
from tests.checkpoints.anyres_files import LONG
from tests.fakes import byte_tokenizer, picture
from tests.parity.anyres_reference import Original
from tests.parity.peers import assert_close
from tests.parity.test_llava_original_anyres import FIRST_FOUR, ODD, UNPAD, load, save

pytestmark = pytest.mark.parity

START, END = 257, 258  # <|im_start|>, <|im_end|>
SETTINGS = {
    "image_grid_pinpoints": "(1x1),...,(2x2)",
    "grids": FIRST_FOUR,
    "mm_newline_position": "grid",
    "mm_spatial_pool_mode": "bilinear",
    "alpha": 9.0,
    "logit_scale": 50.0,
    **UNPAD,
}


def save_llave(folder: Path, **changes: Any) -> Original:
    reference = save(
        folder,
        "anyres_max_9",
        text=Qwen2Config(**LONG),
        vision=SiglipVisionConfig(**ODD, vision_use_head=False),
        **SETTINGS | changes,
    )
    byte_tokenizer().save(str(folder / "tokenizer.json"))  # Qwen's writes no beginning
    words = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    return reference


def text_ids(text: str) -> list[int]:
    ids: list[int] = byte_tokenizer().encode(text, add_special_tokens=False).ids
    return ids


def prompt_ids(text: str, visual: int = 0) -> list[int]:
    """Build LLaVE's prompt message by message, as its training code does."""
    newline = text_ids("\n")
    assert len(newline) == 1
    system = [START, *text_ids("system\nYou are a helpful assistant."), END, *newline]
    image = [*[0] * visual, *newline] if visual else []
    user = [START, *text_ids("user\n"), *image, *text_ids(text), END, *newline]
    assistant = [START, *text_ids("assistant\n"), *newline, END, *newline]
    return [*system, *user, *assistant]


@torch.no_grad()
def vector_of(reference: Original, ids: list[int], visual: torch.Tensor | None) -> torch.Tensor:
    """Return the final hidden state of the last token, normalised."""
    embeddings = reference.peer.get_input_embeddings()(torch.tensor(ids))
    if visual is not None:
        first = ids.index(0)
        embeddings[first : first + len(visual)] = visual
    hidden = reference.peer.model.language_model(inputs_embeds=embeddings[None]).last_hidden_state
    return torch.nn.functional.normalize(hidden[0, -1], dim=0)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Original, visavis.Model]:
    folder = tmp_path_factory.mktemp("any-name")
    return save_llave(folder), load(folder)


@torch.no_grad()
def test_vectors_and_their_prompts(loaded: tuple) -> None:
    reference, model = loaded
    image, question = picture(1, (90, 61)), "What is it?"
    frames = [picture(number, (50, 41)) for number in range(2)]
    seen, watched = reference.image(image), reference.video(frames)
    assert len(watched) == 2 * 2 * (2 + 1)  # a newline after each row of two pooled tokens
    video = visavis.Video(tuple(map(visavis.Image, frames)))
    represent = "Represent the given image with the following question:"
    items: list[tuple[Any, str | None, list[int], Any]] = [
        ("A cat and a dog", None, prompt_ids("A cat and a dog"), None),
        ({"image": image}, None, prompt_ids("", len(seen)), seen),
        (
            {"image": image, "text": question},
            represent,
            prompt_ids(f"{represent} {question}\n", len(seen)),
            seen,
        ),
        (
            {"video": video, "text": "Represent the given video."},
            None,
            prompt_ids("Represent the given video.", len(watched)),
            watched,
        ),
    ]
    for item, instruction, ids, visual in items:
        encoded = model.encoder.item(visavis.Prompt.of(item), instruction)
        assert encoded.token_ids == ids
        assert ids[-1] == text_ids("\n")[0]  # what is pooled
        vector = torch.from_numpy(model.embed([item], instruction=instruction)[0])
        assert_close(vector, vector_of(reference, ids, visual), f"{instruction} {len(ids)}")
    plain = [item for item, instruction, _, _ in items if instruction is None]
    singles = np.concatenate([model.embed([item]) for item in plain])
    assert np.allclose(model.embed(plain), singles, atol=1e-5)


def test_it_chats_too(loaded: tuple) -> None:
    """Its language model is whole, in the format that its base was trained with."""
    _, model = loaded
    assert model.profile.chat_template == "qwen_1_5"
    image = picture(1, (90, 61))
    trace = model.trace({"image": image, "text": "Why?"})
    visual = trace.image_slots[0][1]
    asked = prompt_ids("Why?", visual)[: -len(text_ids("\n\n")) - 1]
    assert trace.token_ids.tolist() == asked
    assert model.chat("Why?", images=[image], max_new_tokens=3).usage.completion_tokens <= 3


@pytest.mark.parametrize("missing", ["alpha", "logit_scale"])
def test_what_it_is_follows_from_its_settings_alone(missing: str, tmp_path: Path) -> None:
    save_llave(tmp_path / "LLaVE-2B", **{missing: None})
    model = load(tmp_path / "LLaVE-2B")
    assert model.profile.embed_suffix == ""
    assert model.encoder.item(visavis.Prompt.of("a")).token_ids == text_ids("a")
