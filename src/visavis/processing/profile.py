"""The prompt profile: everything about prompts that a checkpoint must bring along.

Saved with the weights and never guessed from a name. Knows no tokenizer and renders nothing; see
`templates.py` for what the fields do.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

CHAT_FIELDS = (
    "turns",
    "jinja",
    "image_start",
    "image_end",
    "video_times",
)  # the others are for embedding


@dataclass(frozen=True)
class PromptProfile:
    """How one checkpoint wants to be asked, and how it embeds.

    Args:
        turns: name of a template in `turns.TURNS` for chat; empty: use `jinja`.
        jinja: a chat template's source; both empty: the checkpoint cannot chat.
        image_start, image_end: special tokens around each image's own (LLaVA 1.0's
            mm_use_im_start_end), within what `turns` writes there.
        video_times: whose sentence on a video's length and its frames' times stands after each
            video in chat; empty: nobody's.
        embed_prefix, embed_suffix: text around an item that is embedded.
        embed_image_end: text after each of its images.
        pooling: `head` is the trained embedding head, `last` the final hidden state of the last
            token, `mean` the mean of final hidden states; all are L2-normalised.
        instruction_form: how an instruction and a text are joined; both fields must occur.
        embed_positions: of items of models with M-RoPE: `grid` on three axes, as in chat, or `flat`
            0, 1, 2, … as for text alone, which VLM2Vec trained with.
    """

    turns: str = ""
    jinja: str = ""
    image_start: str = ""
    image_end: str = ""
    video_times: Literal["", "llava-video"] = ""
    embed_prefix: str = ""
    embed_suffix: str = ""
    embed_image_end: str = ""
    pooling: Literal["head", "last", "mean"] = "last"
    instruction_form: str = "{instruction}\n{text}"
    embed_positions: Literal["grid", "flat"] = "grid"

    def instructed(self, instruction: str, text: str) -> str:
        """Return an instruction and a text as one; without a text nothing is left between them."""
        before, after = self.instruction_form.split("{text}")
        form = f"{before}{{text}}{after}" if text else f"{before.rstrip()}{after}"
        return form.format(instruction=instruction, text=text)

    def embedding_as(self, other: PromptProfile) -> PromptProfile:
        """Return a profile that chats as this one and embeds as another."""
        kept = {name: getattr(self, name) for name in CHAT_FIELDS}
        return dataclasses.replace(other, **kept)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


PROFILES = {  # how published models embed, where their files do not say
    # LLaVE: the answer is a newline, and the newline after its end is what is pooled.
    "llave": PromptProfile(
        embed_prefix="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n",
        embed_suffix="<|im_end|>\n<|im_start|>assistant\n\n<|im_end|>\n",
        embed_image_end="\n",
        instruction_form="{instruction} {text}\n",
    ),
    # VLM2Vec: no chat format and no marks around a picture's tokens, so that the code it was
    # trained with found no pictures to count positions for. The first is what MMEB's image data
    # hold, for both versions; the second what the second version makes of videos and pages.
    "vlm2vec-v1": PromptProfile(
        embed_image_end="\n",
        instruction_form="{instruction} {text}\n",
        embed_positions="flat",
    ),
    "vlm2vec-v2": PromptProfile(
        embed_image_end=" ",
        instruction_form="{instruction} {text}",
        embed_positions="flat",
    ),
}
