"""The prompt profile: everything about prompts that a checkpoint must bring along.

Saved with the weights and never guessed from a name. Knows no tokenizer and renders nothing; see
`templates.py` for what the fields do.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class PromptProfile:
    """How one checkpoint wants to be asked, and how it embeds.

    Args:
        turns: name of a template in `turns.TURNS` for chat; empty: use `jinja`.
        jinja: a chat template's source; both empty: the checkpoint cannot chat.
        image_start, image_end: special tokens around each image's own (LLaVA 1.0's
            mm_use_im_start_end), within what `turns` writes there.
        embed_prefix, embed_suffix: text around an item that is embedded.
        embed_image_end: text after each of its images.
        pooling: `head` is the trained embedding head, `last` the final hidden state of the last
            token, `mean` the mean of final hidden states; all are L2-normalised.
        instruction_form: how an instruction and a text are joined; both fields must occur.
    """

    turns: str = ""
    jinja: str = ""
    image_start: str = ""
    image_end: str = ""
    embed_prefix: str = ""
    embed_suffix: str = ""
    embed_image_end: str = ""
    pooling: Literal["head", "last", "mean"] = "last"
    instruction_form: str = "{instruction}\n{text}"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
