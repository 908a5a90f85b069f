"""Images and videos written with text among their placeholders: what stands where, whose ids they
are, and what of a prompt is learned.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image as pil

from tests.fakes import byte_tokenizer, picture, tiny_config
from visavis.errors import InputError
from visavis.inputs import Image, Message, Prompt, Text, Video
from visavis.model.image_input import ImageGrid
from visavis.processing.config import ImageProcessorConfig, RatioConfig, SplitConfig
from visavis.processing.idefics3 import canvas, longest
from visavis.processing.images import ContentHasher
from visavis.processing.internvl import nearest_canvas
from visavis.processing.prompt_config import PromptConfig
from visavis.processing.prompt_encoder import PreparedPrompt, PromptEncoder
from visavis.processing.tokenizer import SpecialTokens
from visavis.processing.visual_text import (
    VisualText,
    idefics3_text,
    internvl_text,
    visuals_of,
    write_out,
)

AROUND, WHOLE = "<fake_token_around_image>", "<global-img>"
PARTS = (
    "{% for m in messages %}{{ m['role'] }}: {% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'video' %}<video>{% else %}<image>{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def encoder(**profile: object) -> PromptEncoder:
    tokenizer = byte_tokenizer()
    added = tokenizer.get_added_tokens_decoder()
    by_text = {token.content: number for number, token in added.items()}
    config = tiny_config()
    decoder = dataclasses.replace(config.decoder, context_length=4096)
    return PromptEncoder(
        "tiny",
        dataclasses.replace(config, decoder=decoder),
        tokenizer,
        SpecialTokens(None, by_text["<|im_end|>"], (by_text["<|im_end|>"],), None, False, by_text),
        PromptConfig(jinja=PARTS, image_text="idefics3", **profile),  # type: ignore[arg-type]
        ImageProcessorConfig(
            32, "split", (0.5,) * 3, (0.5,) * 3, split=SplitConfig(64, video_edge=32)
        ),
    )


def shown(found: PreparedPrompt) -> str:
    """Return ids as text, each run of placeholders as its length in brackets."""
    tokenizer, text, at = byte_tokenizer(), "", 0
    for start, length in found.image_slots:
        text += tokenizer.decode(found.token_ids[at:start], skip_special_tokens=False)
        text += f"[{length}]"
        at = start + length
    return text + tokenizer.decode(found.token_ids[at:], skip_special_tokens=False)


def chat(own: PromptEncoder, *parts: object, answer: str = "") -> PreparedPrompt:
    messages = [Message("user", parts)]  # type: ignore[arg-type]
    messages += [Message("assistant", (Text(answer),))] if answer else []
    prompt = ContentHasher().identify(Prompt(tuple(messages)))
    return own.chat(prompt, add_generation_prompt=not answer)


def test_tiles_have_their_places() -> None:
    found = chat(encoder(), Text("a "), Image(picture(1, (64, 32))), Text(" b"))
    assert shown(found) == (
        f"user: a {AROUND}<row_1_col_1>[4]{AROUND}<row_1_col_2>[4]\n\n{AROUND}{WHOLE}[4]{AROUND} b"
        "<|im_end|>\nassistant: "
    )
    assert found.slots_per_image == [3]
    square = idefics3_text(ImageGrid(), 4, None)
    assert square == VisualText((AROUND + WHOLE, AROUND), (4,))
    rows = idefics3_text(ImageGrid(rows=2, columns=1), 12, None)
    assert rows.texts[1] == f"\n{AROUND}<row_2_col_1>"
    assert rows.texts[2] == f"\n\n{AROUND}{WHOLE}"


def test_a_key_for_each_token_of_each_image() -> None:
    """The prefix cache must not take one image's tokens for another's, nor a tile for the next."""
    images = [Image(picture(1, (64, 32))), Image(picture(2)), Image(picture(1, (64, 32)))]
    found = chat(encoder(), *images, Text("?"))
    keys = found.token_keys
    placed = [keys[s + n] for s, length in found.image_slots for n in range(length)]
    number, *_ = (sum(n for _, n in found.image_slots[: found.slots_per_image[0]]),)
    assert len(found.image_slots) == sum(found.slots_per_image) == len(placed) // 4
    assert len(set(placed[:number])) == number
    assert placed[:number] == placed[-number:], "the same image again"
    assert not set(placed[:number]) & set(placed[number:-number])
    others = [key for key in keys if not isinstance(key, tuple)]
    assert len(others) == len(keys) - len(placed)


def test_videos_have_a_template_of_their_own() -> None:
    film = Video([picture(number) for number in range(3)], frames=2)
    own = encoder(video_jinja="film: " + PARTS)
    text = shown(chat(own, film, Text("?")))
    assert text == (
        "film: user: You are provided the following series of two frames from a 0:00:01 [H:MM:SS] "
        f"video.\n\nFrame from 00:00:{AROUND}{WHOLE}[4]{AROUND}\n"
        f"Frame from 00:01:{AROUND}{WHOLE}[4]{AROUND}\n\n?<|im_end|>\nassistant: "
    )
    assert shown(chat(own, Text("?"))).startswith("user: ?")
    bare = "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'text' %}"
    bare += "{{ part['text'] }}{% elif part['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    with pytest.raises(InputError, match="dropped, repeated or moved"):
        chat(
            dataclasses.replace(
                own, profile=PromptConfig(jinja=bare + "{% endfor %}", image_text="idefics3")
            ),
            film,
        )


def test_only_the_answer_is_learned() -> None:
    found = chat(encoder(), Image(picture(1, (64, 32))), Text("<video> <image>?"), answer="yes")
    kept = [one for one, learned in zip(found.token_ids, found.loss_mask, strict=True) if learned]
    text = byte_tokenizer().decode(kept, skip_special_tokens=False)
    assert text.startswith("yes<|im_end|>") and len(found.image_slots) == 3


def test_placeholders_in_another_order_are_found() -> None:
    prompt = Prompt.of([Image(picture(1)), Video([picture(2)]), Text("?")])
    texts = [idefics3_text(ImageGrid(), 4, None), idefics3_text(ImageGrid(video=True), 4, ([0], 1))]
    visuals = visuals_of(prompt, 7, -1, texts)
    _, mask, found = write_out(
        "<image> <video>", [False] * 7 + [True] * 8, "<image>", "<video>", visuals
    )
    assert found == 2 and sum(mask) > 8 and mask[-1]
    for moved in ("<video><image>", "<image>", "", "<image><video><image>"):
        assert write_out(moved, [], "<image>", "<video>", visuals)[2] in (0, 1, 2)
    assert write_out("<video><image>", [], "<image>", "<video>", visuals)[2] == 0


def test_frames_of_internvl_stand_in_lines() -> None:
    film = internvl_text(ImageGrid(2, video=True), 8, ((0.0, 1.0), 2.0))
    assert film.join(["A", "B"]) == "Frame1: <img>A</img>\nFrame2: <img>B</img>"
    assert internvl_text(ImageGrid(rows=2, columns=2), 20, None).counts == (20,)


def test_canvases() -> None:
    assert longest((1, 65535), 2048) == (1, 2048) and canvas((1, 2048), 512) == (512, 2048)
    assert longest((65535, 1), 2048) == (2048, 1) and canvas((2048, 1), 512) == (2048, 512)
    assert longest((3, 2), 126) == (126, 84) and longest((100, 33), 126) == (126, 42)
    ratio = RatioConfig(1, 12)
    assert nearest_canvas((448, 448), 448, ratio) == (1, 1)
    assert nearest_canvas((4480, 4480), 448, ratio) == (3, 3)
    assert nearest_canvas((65535, 1), 448, ratio) == (12, 1)
    assert nearest_canvas((1, 65535), 448, RatioConfig(1, 1)) == (1, 1)


@pytest.mark.parametrize("values", [{"longest_edge": 0}, {"longest_edge": 5000}, {"cut": 1}])
def test_bad_sizes_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(InputError, match="split config"):
        SplitConfig.from_dict({"longest_edge": 64} | values)
    with pytest.raises(InputError, match="ratio config"):
        RatioConfig(3, 2)
    with pytest.raises(InputError, match="unknown key 'tiles'"):
        RatioConfig.from_dict({"tiles": 2})


def test_wide_images_stay_within_memory() -> None:
    own = encoder()
    image = Image(pil.fromarray(np.zeros((1, 30000, 3), np.uint8)))
    assert len(chat(own, image, Text("?")).image_slots) == 3
