"""Training examples: a conversation, or a query with its target and hard negatives.

Both hold prompts; their images are not read yet. `data/formats/` makes them from data files, and
`data/sampler.py` decides their order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from visavis.inputs import Prompt, Text, Video


@dataclass(frozen=True)
class Conversation:
    """A conversation; its assistant messages are learned.

    Args:
        id: unique within its source; named in error messages.
    """

    id: str
    prompt: Prompt


@dataclass(frozen=True)
class ContrastiveExample:
    """A query, what it should find, and what it should not.

    Args:
        id: unique within its source; negatives that were mined elsewhere are joined by it.
        negatives: hard negatives, any number of them.
        group: samples of one group are no negatives of each other; empty: by target alone.
        instruction, target_instruction: what the query's and the targets' vectors are for; joined
            to their texts as the model's profile says.
    """

    id: str
    query: Prompt
    target: Prompt
    negatives: tuple[Prompt, ...] = ()
    group: str = ""
    instruction: str = ""
    target_instruction: str = ""


Sample: TypeAlias = Conversation | ContrastiveExample

CHARACTERS_PER_TOKEN = 4
VIDEO_IMAGES = 8  # of how many pictures' tokens a video is taken for


def estimated_tokens(sample: Sample, tokens_per_image: int) -> int:
    """Return about how many tokens a sample will be, from its texts and number of images."""
    prompts = (
        (sample.prompt,)
        if isinstance(sample, Conversation)
        else (sample.query, sample.target, *sample.negatives)
    )
    total = 0
    for prompt in prompts:
        for message in prompt.messages:
            for part in message.parts:
                if isinstance(part, Text):
                    total += len(part.text) // CHARACTERS_PER_TOKEN + 1
                else:
                    total += tokens_per_image * (VIDEO_IMAGES if isinstance(part, Video) else 1)
    return total
