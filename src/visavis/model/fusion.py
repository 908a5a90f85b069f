"""Where an image becomes tokens.

    pixels [N, 3, S, S]
      └─ vision tower ──► features [N, prefix + P, W]     which hidden state: `select_layer`
           └─ select ───► [N, P, W]                        drop the class token or keep it
                └─ connector ──► image tokens [N, P', D]
                     └─ splice ──► written over the placeholders of the packed stream [T, D]

The number of placeholders is decided where text becomes tokens (`processing/templates.py`); here
they are only counted, and a mismatch is an error: scattering anyway would shift every later image.
"""

from __future__ import annotations

from torch import Tensor

from visavis.errors import InputError
from visavis.model.config import ViTConfig, VLMConfig


def select(hidden: Tensor, config: VLMConfig) -> Tensor:
    """Return the features a connector reads, [N, P, W], of a tower's hidden state."""
    if isinstance(config.tower, ViTConfig) and config.select_feature == "patch":
        return hidden[:, config.tower.num_prefix_tokens :]
    return hidden


def splice(embeddings: Tensor, image_tokens: Tensor, image_positions: Tensor) -> Tensor:
    """Write image tokens over their placeholders.

    Args:
        embeddings: token embeddings of the packed stream [T, D].
        image_tokens: [N, P, D], images in order of appearance.
        image_positions: int64 [S], where placeholders stand in the stream, ascending.

    Raises:
        InputError: S is not N x P.
    """
    rows = image_tokens.flatten(0, 1)  # [N * P, D]
    if len(rows) != len(image_positions):
        raise InputError(
            f"the prompt holds {len(image_positions)} image placeholders but {len(image_tokens)} "
            f"images give {len(rows)} image tokens; each image needs as many placeholders as it "
            "has tokens. Build prompts with visavis.Prompt, which counts them."
        )
    return embeddings.index_copy(0, image_positions, rows.to(embeddings.dtype))
