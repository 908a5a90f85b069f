"""How a model's prompt profile turns an item of a suite into what is embedded.

The profile belongs to the model. Models trained on MMEB's strings (the profiles vlm2vec-v1,
vlm2vec-v2 and llave) embed an item's verbatim string; all others get its instruction and text, put
together as their profile says.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from visavis.evaluate.items import VISUAL, Item
from visavis.inputs import Message, Part, Prompt, Text
from visavis.processing.prompt_config import PROFILES, PromptConfig

if TYPE_CHECKING:
    from visavis.api import Model

VERBATIM = ("vlm2vec-v1", "vlm2vec-v2", "llave")  # and those with the same forms


def profile_name(profile: PromptConfig) -> str:
    """Return the name of a profile, or "own" where the checkpoint brings one without a name."""
    plain = PromptConfig().embedding_as(profile)
    for name, known in PROFILES.items():
        if PromptConfig().embedding_as(known) == plain:
            return name
    return "own"


def with_profile(model: Model, profile: PromptConfig) -> Model:
    """Return the same weights with another prompt profile."""
    other = copy.copy(model)
    other.profile = profile
    other.encoder = replace(model.encoder, profile=profile)
    return other


def model_key(model: Model) -> str:
    """Return all that decides a model's vectors, as one string."""
    types = sorted({str(weight.dtype) for weight in model.vlm.parameters()})
    return f"{model.fingerprint} {model.profile} {model.processor} {types} {model.device.type}"


def embed_items(model: Model, items: Sequence[Item]) -> np.ndarray:
    """Return one unit vector per item, float32 [N, D]."""
    vectors = np.empty((len(items), model.embedding_dim), np.float32)
    takes_verbatim = profile_name(model.profile) in VERBATIM
    by_instruction: dict[str, list[int]] = defaultdict(list)
    verbatim: list[int] = []
    for number, item in enumerate(items):
        if takes_verbatim and item.verbatim:
            verbatim.append(number)
        else:
            by_instruction[item.instruction].append(number)
    if verbatim:
        bare = with_profile(model, replace(model.profile, embed_image_end=""))
        vectors[verbatim] = bare.embed([verbatim_prompt(items[number]) for number in verbatim])
    for instruction, numbers in by_instruction.items():
        prompts = [plain_prompt(items[number], instruction) for number in numbers]
        vectors[numbers] = model.embed(prompts, instruction=instruction or None)
    return vectors


def verbatim_prompt(item: Item) -> Prompt:
    """Return an item's verbatim string with its image or video in the place of its mark."""
    if not item.visuals:
        return Prompt.of(item.verbatim)
    before, _, after = item.verbatim.partition(VISUAL)
    parts: list[Part] = [Text(before)] if before else []
    parts += [*item.visuals, *([Text(after)] if after else [])]
    return Prompt((Message("user", tuple(parts)),))


def plain_prompt(item: Item, instruction: str) -> Prompt:
    """Return an item's visuals and text; where it has neither, the instruction stands alone."""
    parts: list[Part] = list(item.visuals)
    if item.text:
        parts.append(Text(item.text))
    return Prompt((Message("user", tuple(parts)),))
