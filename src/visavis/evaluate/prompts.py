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
from visavis.processing.profile import PROFILES, PromptProfile
from visavis.prompt import Message, Part, Prompt, Text

if TYPE_CHECKING:
    from visavis.api import Model

VERBATIM = ("vlm2vec-v1", "vlm2vec-v2", "llave")


def profile_name(profile: PromptProfile) -> str:
    """Return the name of a profile, or "own" where the checkpoint brings one without a name."""
    plain = PromptProfile().embedding_as(profile)
    for name, known in PROFILES.items():
        if PromptProfile().embedding_as(known) == plain:
            return name
    return "own"


def with_profile(model: Model, profile: PromptProfile) -> Model:
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
    if profile_name(model.profile) in VERBATIM:
        bare = with_profile(model, replace(model.profile, embed_image_end=""))
        return bare.embed([verbatim_prompt(item) for item in items])
    vectors = np.empty((len(items), model.embedding_dim), np.float32)
    by_instruction: dict[str, list[int]] = defaultdict(list)
    for number, item in enumerate(items):
        by_instruction[item.instruction].append(number)
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
