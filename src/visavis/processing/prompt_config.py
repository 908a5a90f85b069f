"""The prompt profile: everything about prompts that a checkpoint must bring along.

It is saved with the weights and never guessed from a name. `prompt_encoder.py` applies it, and
`chat_template.py` its chat format.
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

CHAT_FIELDS = (
    "chat_template",
    "jinja",
    "image_start",
    "image_end",
    "image_text",
    "video_jinja",
    "video_times",
)  # the others are for embedding


@dataclass(frozen=True)
class PromptConfig:
    """How one checkpoint wants to be asked, and how it embeds.

    Args:
        chat_template: name of a format in `CHAT_FORMATS`; empty: use `jinja`.
        jinja: a chat template's source; both empty: the checkpoint cannot chat.
        image_start, image_end: special tokens around each image's own (LLaVA 1.0's
            mm_use_im_start_end), within what `chat_template` writes there.
        image_text: whose way to write an image or video, with text among its placeholders (see
            `visual_text.py`); empty: one run of placeholders.
        video_jinja: source of the chat template of prompts that hold a video; empty: `jinja`.
        video_times: whose sentence on a video's length and its frames' times stands after each
            video in chat; empty: nobody's.
        embed_prefix, embed_suffix: text around an item that is embedded.
        embed_image_start, embed_image_end: text around each of its images and videos.
        text_form, visual_form, visual_text_form: the whole of an item of text, of images or videos,
            and of both, with {instruction}, {visual} and {text}; where they are given they stand
            in the place of `embed_prefix`, `embed_suffix` and `instruction_form`. What they leave
            out, such as an instruction, the model is not given.
        document_form: the same of a text that is to be found, in multi-vector models, whose
            `text_form` is that of a query. They take one image or one text.
        default_instruction: the {instruction} of these forms where none is given.
        pooling: `head` is the trained embedding head, `last` the final hidden state of the last
            token, `first` that of the first, `mean` the mean of all; all are L2-normalised.
            `multi` gives a vector per token, through the multi-vector head.
        instruction_form: how an instruction and a text are joined; both fields must occur.
        embed_positions: of items of models with M-RoPE: `grid` on three axes, as in chat, or `flat`
            0, 1, 2, … as for text alone, which VLM2Vec trained with.
        instruction_end: what ends an instruction of these forms that ends without punctuation.
        reranker: whose question about a query and a document the model answers with yes or no (see
            `reranker.py`); empty: it is no reranker.
        min_score: the cosine similarity of a text and an image below which an image most likely
            does not show what the text says, calibrated on held-out images; -1: not calibrated.
    """

    chat_template: str = ""
    jinja: str = ""
    image_start: str = ""
    image_end: str = ""
    image_text: Literal["", "idefics3", "internvl", "qwen3-vl"] = ""
    video_jinja: str = ""
    video_times: Literal["", "llava-video"] = ""
    embed_prefix: str = ""
    embed_suffix: str = ""
    embed_image_start: str = ""
    embed_image_end: str = ""
    text_form: str = ""
    visual_form: str = ""
    visual_text_form: str = ""
    document_form: str = ""
    default_instruction: str = ""
    pooling: Literal["head", "last", "first", "mean", "multi"] = "last"
    instruction_form: str = "{instruction}\n{text}"
    embed_positions: Literal["grid", "flat"] = "grid"
    instruction_end: str = ""
    reranker: Literal["", "qwen3-vl"] = ""
    min_score: float = -1.0

    def instructed(self, instruction: str, text: str) -> str:
        """Return an instruction and a text as one; without a text nothing is left between them."""
        before, after = self.instruction_form.split("{text}")
        form = f"{before}{{text}}{after}" if text else f"{before.rstrip()}{after}"
        return form.format(instruction=instruction, text=text)

    def around(
        self, has_visuals: bool, has_text: bool, instruction: str, document: bool = False
    ) -> tuple[str, str, str]:
        """Return the texts of the forms before, between and after the parts of an item.

        The second text is between the visuals and the text of the item.
        """
        form = self.document_form if document else self.text_form
        if has_visuals:
            form = self.visual_text_form if has_text else self.visual_form
        before, _, after = form.partition("{visual}" if has_visuals else "{text}")
        between, _, end = after.partition("{text}") if has_visuals and has_text else ("", "", after)
        if self.instruction_end and (instruction := instruction.strip()):
            ended = unicodedata.category(instruction[-1]).startswith("P")
            instruction += "" if ended else self.instruction_end
        instruction = instruction or self.default_instruction
        return before.replace("{instruction}", instruction), between, end

    def embedding_as(self, other: PromptConfig) -> PromptConfig:
        """Return a profile that chats as this one and embeds as another."""
        kept = {name: getattr(self, name) for name in CHAT_FIELDS}
        return dataclasses.replace(other, **kept)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


_SYSTEM = (
    "<|im_start|>system\n{{instruction}}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
_E5V = (
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n \n"
)


def _as_system(form: str, default_instruction: str, instruction_end: str = "") -> PromptConfig:
    """Return a profile whose instruction is the system's message."""
    return PromptConfig(
        embed_image_start="<|vision_start|>",
        embed_image_end="<|vision_end|>",
        text_form=form.format("{text}"),
        visual_form=form.format("{visual}"),
        visual_text_form=form.format("{visual}{text}"),
        default_instruction=default_instruction,
        instruction_end=instruction_end,
    )


_GME = _as_system(_SYSTEM + "<|endoftext|>", "You are a helpful assistant.")
# VLM2Vec: no chat format and no marks around a picture's tokens, so that the code it was trained
# with found no pictures to count positions for. The first is what MMEB's image data hold, for both
# versions; the second what the second version makes of videos and pages.
_VLM2VEC_V1 = PromptConfig(
    embed_image_end="\n",
    instruction_form="{instruction} {text}\n",
    embed_positions="flat",
)
_VLM2VEC_V2 = PromptConfig(
    embed_image_end=" ",
    instruction_form="{instruction} {text}",
    embed_positions="flat",
)
PROFILES = {  # how published models embed, where their files do not say
    # LLaVE: the answer is a newline, and the newline after its end is what is pooled.
    "llave": PromptConfig(
        embed_prefix="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n",
        embed_suffix="<|im_end|>\n<|im_start|>assistant\n\n<|im_end|>\n",
        embed_image_end="\n",
        instruction_form="{instruction} {text}\n",
    ),
    "vlm2vec-v1": _VLM2VEC_V1,
    "vlm2vec-v2": _VLM2VEC_V2,
    # GME and Ops-MM-embedding-v1.
    "gme": _GME,
    "ops-mm": _GME,
    # B3 and UniME-V2 grew from VLM2Vec. B3 has the lines of its first version; what its targets
    # begin with ("Represent the answer: ") is part of their text. UniME-V2's own examples have a
    # blank after the image; MMEB's data bring their lines along.
    "b3": _VLM2VEC_V1,
    "unime-v2": _VLM2VEC_V2,
    # Qwen3-VL-Embedding: without a word after the answer's start.
    "qwen3-vl-embedding": _as_system(_SYSTEM, "Represent the user's input.", "."),
    # Qwen3-VL-Reranker.
    "qwen3-vl-reranker": PromptConfig(reranker="qwen3-vl"),
    # E5-V: each kind of item is summed up in one word; instructions are not given.
    "e5-v": PromptConfig(
        text_form=_E5V.format("{text}\nSummary above sentence in one word: "),
        visual_form=_E5V.format("{visual}\nSummary above image in one word: "),
        visual_text_form=_E5V.format(
            "{visual}\n{text}\nSummary above image and text in one word: "
        ),
    ),
    # Nothing around an item; its instruction in a line of its own.
    "plain": PromptConfig(),
}

# Classes of code that a checkpoint names (and that is never run) -> how it embeds.
CLASSES = {"GmeQwen2VL": "gme"}


def stated_profile(settings: Mapping[str, Any]) -> str:
    """Return the name of the profile that a config.json calls for; empty: it says nothing.

    Its `auto_map` names the class of an embedder's own code, such as
    "modeling_gme_qwen2vl.GmeQwen2VL".
    """
    named = settings.get("auto_map")
    classes = named.values() if isinstance(named, Mapping) else ()
    found = {CLASSES.get(str(one).rpartition(".")[2], "") for one in classes} - {""}
    return found.pop() if len(found) == 1 else ""
