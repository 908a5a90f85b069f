"""LLaVA 1.0's tokens around each image (mm_use_im_start_end), in checkpoints and in first stages
that bring their rows; and its chat format without a token at the end of an answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM

import visavis
from tests.checkpoints.llava_files import original_names, save_original, save_tower, tiny_peer
from tests.checkpoints.transformers_files import TEXT, fast_tokenizer
from tests.fakes import picture
from visavis.errors import CheckpointError
from visavis.generate.engine import Engine
from visavis.generate.streaming import Reply
from visavis.inputs import Prompt

TOKENS = ["<im_patch>", "<im_start>", "<im_end>"]
ON = {"mm_use_im_start_end": True, "mm_use_im_patch_token": True, "mm_projector_type": "mlp2x_gelu"}
QUESTION = "What is this?"


def load(folder: Path, **settings: Any) -> visavis.Model:
    return visavis.load(folder, precision="f32", device="cpu", **settings)


def tokenizer_with(tokens: list[str]) -> Any:
    tokenizer = fast_tokenizer()
    tokenizer.add_tokens([AddedToken(text, special=True) for text in tokens], special_tokens=True)
    return tokenizer


def expected_ids(tokenizer: Any, num_patches: int) -> list[int]:
    """Tokenise as LLaVA does: the tokens around an image are part of the text around it."""
    text = f"USER: <im_start><image><im_end>\n{QUESTION} ASSISTANT:"
    before, after = text.split("<image>")
    ids: list[int] = tokenizer(before)["input_ids"][1:]
    return [*ids, *[0] * num_patches, *tokenizer(after)["input_ids"][1:]]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    peer = tiny_peer()
    save_original(tmp_path, peer, **ON)
    save_tower(tmp_path / "vision_tower", peer)
    tokenizer_with(TOKENS).save_pretrained(tmp_path)
    return tmp_path


def test_around_each_image(checkpoint: Path) -> None:
    model = load(checkpoint)
    trace = model.trace({"image": picture(1), "text": QUESTION})
    wanted = expected_ids(tokenizer_with(TOKENS), trace.image_slots[0][1])
    assert trace.token_ids.tolist()[-len(wanted) :] == wanted
    item = model.encoder.item(visavis.Prompt.of({"image": picture(1), "text": "a"}))
    assert [item.token_ids[at] for at in (1, -2)] == [261, 262]
    typed = model.trace("<im_start> <im_end>").token_ids
    assert not {261, 262} & set(typed.tolist())


def test_a_tokenizer_without_them_is_refused(checkpoint: Path) -> None:
    fast_tokenizer().save_pretrained(checkpoint)
    with pytest.raises(CheckpointError, match=r"gives <im_start>, <im_end> the ids \[None, None\]"):
        load(checkpoint)


def save_stage(folder: Path, rows: Any, **settings: Any) -> dict[str, torch.Tensor]:
    """Write a base whose vocabulary its tokenizer fills, and a first stage; return the base's."""
    text = LlamaConfig(**TEXT | {"vocab_size": 260})
    peer = tiny_peer(text)
    tensors = original_names(peer)
    language_model = LlamaForCausalLM(text)
    own = {name: tensors[name] for name in language_model.state_dict()}
    language_model.load_state_dict(own)
    language_model.save_pretrained(folder / "base")
    fast_tokenizer().save_pretrained(folder / "base")
    save_original(folder / "stage", peer, with_words=False, **ON | settings)
    (folder / "stage" / "model.safetensors").unlink()
    projector = {name: t for name, t in tensors.items() if "mm_projector" in name}
    if rows is not None:
        projector["model.embed_tokens.weight"] = rows
    torch.save(projector, folder / "stage" / "mm_projector.bin")
    save_tower(folder / "tower", peer)
    return own


@pytest.mark.parametrize("num_rows", [2, 263])
def test_a_first_stage_that_trained_them(num_rows: int, tmp_path: Path) -> None:
    """All rows of the grown vocabulary are saved, or the new ones alone; the last two count."""
    rows = torch.randn(num_rows, 32, generator=torch.Generator().manual_seed(0))
    base = save_stage(tmp_path, rows)
    parts = {"base": tmp_path / "base", "vision_tower": tmp_path / "tower"}
    model = load(tmp_path / "stage", **parts, chat_template="vicuna_v1")
    embeddings, head = model.vlm.decoder.embed.weight, model.vlm.decoder.head.weight
    assert torch.equal(embeddings[:260], base["model.embed_tokens.weight"])
    assert torch.equal(embeddings[261:], rows[-2:])
    assert torch.allclose(embeddings[260], base["model.embed_tokens.weight"].mean(0))
    assert torch.allclose(head[260:], base["lm_head.weight"].mean(0).expand(3, -1))
    trace = model.trace({"image": picture(1), "text": QUESTION})
    wanted = expected_ids(tokenizer_with(TOKENS), trace.image_slots[0][1])
    assert trace.token_ids.tolist()[-len(wanted) :] == wanted


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    parts = {"base": tmp_path / "base", "vision_tower": tmp_path / "tower"}
    save_stage(tmp_path, None)
    with pytest.raises(CheckpointError, match="embeddings of shape None, expected one of .*263"):
        load(tmp_path / "stage", **parts)
    save_stage(tmp_path, torch.ones(5, 32))
    with pytest.raises(CheckpointError, match=r"embeddings of shape \(5, 32\)"):
        load(tmp_path / "stage", **parts)
    save_stage(tmp_path, torch.ones(2, 32), mm_use_im_start_end=False)
    with pytest.raises(CheckpointError, match="holds model.embed_tokens.weight"):
        load(tmp_path / "stage", **parts)


def test_an_answer_ends_at_text_where_no_token_ends_it(checkpoint: Path) -> None:
    model = load(checkpoint, chat_template="llava_v0")

    def say(words: str) -> tuple[list[str], Reply]:
        answer = model.ask(Prompt.chat("What?", [picture(1)]))
        ids = model.tokenizer.encode(words, add_special_tokens=False).ids
        said = iter([*ids, *model.specials.eot_ids])
        answer.sequence.sample = lambda scores: next(said)
        grown = Engine(model.vlm, model.image_encoder).run([answer.sequence])
        return [piece for _ in grown if (piece := answer.update())], answer.reply

    pieces, reply = say("A #1 cat.###Human: no")
    assert "".join(pieces) == reply.text == "A #1 cat."
    assert "#" not in pieces and reply.finish_reason == "stop"
    assert say("so ##")[1].text == "so ##"
