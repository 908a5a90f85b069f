"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL against transformers: tower, hidden states, logits and answers,
packed and cached."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.vision_utils import get_vision_window_index

import visavis
from tests.parity.peers import assert_close
from tests.parity.qwen2_vl_files import (
    END,
    IMAGE,
    PATCH,
    START,
    VIDEO,
    noise,
    peer_inputs,
    save_qwen2_5_vl,
    save_qwen2_vl,
    save_qwen3_vl,
    tokenizer,
)
from visavis.model.attention import SequenceLayout
from visavis.model.batch import PackedBatch
from visavis.model.config import Qwen2VLTowerConfig
from visavis.model.image_input import ImageGrid, ImageInput
from visavis.model.kv_cache import KVCache
from visavis.model.rope import mrope_positions
from visavis.processing.chat_template import Encoded
from visavis.processing.collate import pack
from visavis.processing.qwen2_vl import Qwen2VLProcessor

pytestmark = pytest.mark.parity

SIZES = [(24, 16), (30, 41), (16, 16), (60, 20)]


FAMILIES = {
    "Qwen2-VL": save_qwen2_vl,
    "Qwen2.5-VL": save_qwen2_5_vl,
    "Qwen3-VL": save_qwen3_vl,
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, visavis.Model]:
    folder = tmp_path_factory.mktemp(request.param)
    peer = FAMILIES[request.param](folder)
    return peer, visavis.load(folder, precision="f32", device="cpu")


def seen(model: visavis.Model, *sizes: tuple[int, int], frames: int = 0) -> list[ImageInput]:
    """Return pictures of these sizes, or videos of so many frames."""
    assert model.processor is not None
    found = []
    for number, size in enumerate(sizes):
        pictures = [noise(size, 10 * number + frame) for frame in range(max(1, frames))]
        array, shape = (
            Qwen2VLProcessor(model.processor).video_pixels(pictures)
            if frames
            else Qwen2VLProcessor(model.processor).pixels(pictures[0])
        )
        found.append(ImageInput(torch.from_numpy(array), shape))
    return found


def sequence(model: visavis.Model, parts: list[str | ImageInput]) -> Encoded:
    """Return ids of texts and visuals, with their positions on three axes."""
    tower = model.vlm.config.tower
    assert isinstance(tower, Qwen2VLTowerConfig)
    encoded, shapes = Encoded(), []
    for part in parts:
        if isinstance(part, str):
            encoded.add(list(part.encode()))
            continue
        # Qwen3-VL writes each pair of a video's frames by itself.
        runs = part.shape.frames if tower.position_side else 1
        for number, shape in enumerate(part.shape.split(runs)):
            shapes.append(shape)
            encoded.add([*b" <0>"[: number * 4], START])
            encoded.add_image(VIDEO if shape.video else IMAGE, len(part.pixels) // 4 // runs)
            encoded.add([END])
    length, rate = len(encoded.token_ids), tower.tokens_per_second
    if shapes:
        encoded.positions = mrope_positions(length, encoded.image_slots, shapes, 2, rate)
    return encoded


def packed(model: visavis.Model, sequences: list[list[str | ImageInput]]) -> PackedBatch:
    batch = pack([sequence(model, parts) for parts in sequences])
    batch.visuals = tuple(
        part for parts in sequences for part in parts if isinstance(part, ImageInput)
    )
    return batch


def theirs(peer: Any, model: visavis.Model, parts: list[str | ImageInput]) -> Any:
    visuals = [(part.pixels, part.shape) for part in parts if isinstance(part, ImageInput)]
    inputs = peer_inputs(sequence(model, parts).token_ids, visuals)
    return peer(**inputs, output_hidden_states=True)


@torch.no_grad()
def test_tower_and_merger(pair: tuple[Any, visavis.Model]) -> None:
    peer, model = pair
    visuals = [*seen(model, *SIZES), *seen(model, (33, 24), frames=5)]
    grids = [(one.shape.frames, one.shape.rows, one.shape.columns) for one in visuals]
    patches = torch.cat([one.pixels for one in visuals])
    found = peer.model.visual(patches, grid_thw=torch.tensor(grids))
    assert model.vlm.tower is not None
    hidden = found.last_hidden_state
    if isinstance(peer, Qwen2_5_VLForConditionalGeneration):  # the peer's are in windows
        order, _ = get_vision_window_index(torch.tensor(grids), 2, 4 * PATCH, PATCH)
        hidden = hidden.unflatten(0, (-1, 4))[order.argsort()].flatten(0, 1)
    assert_close(model.vlm.tower(patches, grids)[:, : hidden.shape[1]], hidden, "tower")
    tokens, means = zip(*model.vlm.see(visuals), strict=True)
    inner = getattr(found, "deepstack_features", None) or []
    assert len(inner) == 2 * isinstance(peer, Qwen3VLForConditionalGeneration)
    assert_close(torch.cat(tokens), torch.cat((found.pooler_output, *inner), -1), "mergers")
    sizes = [len(one.pixels) for one in visuals]
    expected = [one.mean(0) for one in hidden.split(sizes)]
    assert_close(torch.stack(means), torch.stack(expected), "mean features")


@torch.no_grad()
def test_every_hidden_state_packed_and_single(pair: tuple[Any, visavis.Model]) -> None:
    """Text alone, one picture, several, a video, and both, in one packed batch."""
    peer, model = pair
    one, two, three, four = seen(model, *SIZES)
    film, short = *seen(model, (20, 33), frames=4), *seen(model, (33, 24), frames=1)
    sequences: list[list[str | ImageInput]] = [
        ["Hello there."],
        [one, "What is this?"],
        ["Which of ", two, three, " is ", four, " like?"],
        ["Look: ", film, "What happens?"],
        [short, three, "Is this it?"],
    ]
    batch = packed(model, sequences)
    last = model.vlm.config.decoder.num_layers
    ours = model.vlm(batch, layers=range(last + 1))
    singles = [theirs(peer, model, parts) for parts in sequences]
    for layer in range(last + 1):
        expected = torch.cat([single.hidden_states[layer][0] for single in singles])
        assert_close(ours[layer], expected, f"hidden state {layer} of a mixed batch")
    logits = torch.cat([single.logits[0] for single in singles])
    assert_close(model.vlm.decoder.logits(ours[last]), logits, "logits of a mixed batch")
    for parts, single in zip(sequences, singles, strict=True):
        alone = model.vlm.decoder.logits(model.vlm(packed(model, [parts]))[-1])
        assert_close(alone, single.logits[0], f"logits of {len(parts)} parts alone")


@torch.no_grad()
@pytest.mark.parametrize("frames", [0, 4])
def test_a_cache_continues_where_the_picture_ends(
    pair: tuple[Any, visavis.Model], frames: int
) -> None:
    _, model = pair
    decoder, parts = model.vlm.decoder, [*seen(model, (60, 20), frames=frames), "What is it? Yes!"]
    batch = packed(model, [parts])
    whole = decoder.logits(model.vlm(batch)[-1])
    split = batch.num_tokens - 5
    cache = KVCache(decoder.config, dtype=torch.float32)
    found = model.vlm(model.vlm.resolve_images(batch).between(0, split), caches=(cache,))[-1]
    rows = [decoder.logits(found)]
    ahead = int(batch.positions[:, :split].max()) + 1 - split
    assert ahead < 0, "positions fall behind tokens"
    for at in range(split, batch.num_tokens):
        position = torch.tensor([cache.length + ahead])
        x = decoder.embed_tokens(batch.token_ids[at : at + 1])
        hidden = decoder(x, position, SequenceLayout((1,), (cache,)))[-1]
        rows.append(decoder.logits(hidden))
    assert_close(torch.cat(rows), whole, "token by token")


def template_ids(
    model: visavis.Model, content: list[dict[str, str]], shapes: list[ImageGrid]
) -> Any:
    """Return the peer's ids of one user message: its template, each placeholder expanded."""
    messages = [{"role": "user", "content": content}]
    peer = tokenizer()
    peer.chat_template = model.profile.jinja
    rendered = peer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for shape in shapes:
        count = shape.frames * shape.rows * shape.columns // 4
        pad = "<|video_pad|>" if shape.video else "<|image_pad|>"
        written, found = pad.upper() * count, pad
        if shape.video and model.profile.image_text:  # as Qwen3-VL's processor was published
            found = f"<|vision_start|>{pad}<|vision_end|>"
            frames = list(range(2 * shape.frames - 1))  # the last one counts twice
            times = Qwen3VLProcessor._calculate_timestamps(None, frames, 2, 2)
            run = found.replace(pad, pad.upper() * (count // shape.frames))
            written = "".join(f"<{time:.1f} seconds>{run}" for time in times)
        rendered = rendered.replace(found, written, 1)
    for pad in ("<|video_pad|>", "<|image_pad|>"):
        rendered = rendered.replace(pad.upper(), pad)
    return peer(rendered)["input_ids"]


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[], SIZES[:1], SIZES[1:]])
def test_ids_logits_and_answer(
    pair: tuple[Any, visavis.Model], sizes: list[tuple[int, int]]
) -> None:
    peer, model = pair
    images = [noise(size, 10 * number) for number, size in enumerate(sizes)]
    visuals = seen(model, *sizes)
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": "What is it?"}]
    ids = template_ids(model, content, [one.shape for one in visuals])
    trace = model.trace({"image": images, "text": "What is it?"} if images else "What is it?")
    assert trace.token_ids.tolist() == ids
    inputs = peer_inputs(ids, [(one.pixels, one.shape) for one in visuals])
    found = peer(**inputs)
    assert_close(torch.from_numpy(trace.logits), found.logits[0], f"{len(sizes)} pictures")
    ends = list(model.specials.eot_ids)
    answer = peer.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=ends)
    wanted = tokenizer().decode(answer[0, len(ids) :], skip_special_tokens=True)
    assert wanted, "these weights say nothing: choose another question"
    assert model.chat("What is it?", images=images, max_new_tokens=12).text == wanted


@torch.no_grad()
def test_videos(pair: tuple[Any, visavis.Model]) -> None:
    peer, model = pair
    film, still = seen(model, (20, 33), frames=3)[0], seen(model, (24, 16))[0]
    frames = [noise((20, 33), seed) for seed in range(3)]
    content = [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "What happens?"}]
    ids = template_ids(model, content, [film.shape, still.shape])
    parts = [visavis.Video(frames), visavis.Image(noise((24, 16), 0)), "What happens?"]
    prompt = visavis.Prompt((visavis.Message("user", tuple(parts)),))
    trace = model.trace(prompt)
    assert trace.token_ids.tolist() == ids
    inputs = peer_inputs(ids, [(one.pixels, one.shape) for one in (film, still)])
    assert_close(torch.from_numpy(trace.logits), peer(**inputs).logits[0], "video and picture")


@torch.no_grad()
def test_turns_before_and_typed_placeholders(pair: tuple[Any, visavis.Model]) -> None:
    _, model = pair
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    prompt = visavis.Prompt.chat("<|image_pad|> here?", [noise((16, 16), 0)], history)
    trace = model.trace(prompt)
    assert [count for _, count in trace.image_slots] == [4]
    text = model.tokenizer.decode(trace.token_ids.tolist(), skip_special_tokens=False)
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    expected = (
        f"{'' if model.profile.image_text else system}"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        f"{'<|image_pad|>' * 4}<|vision_end|><|image_pad|> here?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text == expected
    assert trace.token_ids.tolist().count(IMAGE) == 4, "the typed one is text"


@torch.no_grad()
def test_pictures_of_any_size_in_one_batch(pair: tuple[Any, visavis.Model]) -> None:
    _, model = pair
    items = [{"image": noise(size, 3), "text": "red"} for size in SIZES] + ["text alone"]
    together = model.embed(items)
    alone = np.concatenate([model.embed([item]) for item in items])
    assert_close(torch.from_numpy(together), torch.from_numpy(alone), "batch and singles")
