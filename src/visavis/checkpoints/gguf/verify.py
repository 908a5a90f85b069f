"""How near an exported model is to the one it was written from: both read the same prompts.

Texts, and a picture where the model takes them; compared are the final hidden states, as an
embedding would pool them, and the distributions of every next token. Knows no file's layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image as pil
from tokenizers import Tokenizer
from torch import Tensor

from visavis.checkpoints.gguf.model import load_gguf
from visavis.model.fusion import count_tokens
from visavis.model.visual import Visual
from visavis.model.vlm import VLM
from visavis.processing.images import ImageProcessorConfig
from visavis.processing.pack import pack
from visavis.processing.templates import Encoded
from visavis.processing.tokenizer import SpecialTokens
from visavis.processing.visuals import pixels_of
from visavis.prompt import Image

TEXTS = (
    "The capital of France is Paris, and the capital of Japan is Tokyo.",
    "def area(radius):\n    return 3.14159 * radius ** 2\n",
    "Was siehst du? Ein rotes Quadrat neben einem blauen Kreis, 2 von 10.",
)


class Original(Protocol):
    """What a `Loaded` and a `visavis.Model` have in common."""

    vlm: VLM
    tokenizer: Tokenizer
    specials: SpecialTokens
    processor: ImageProcessorConfig | None


@dataclass(frozen=True)
class Nearness:
    """One prompt read by both models.

    Attributes:
        cosine: of the last token's final hidden states, which is the cosine of embeddings.
        divergence: mean Kullback-Leibler divergence of next-token distributions, in nats.
        agreement: share of positions whose likeliest next token is the same.
    """

    prompt: str
    cosine: float
    divergence: float
    agreement: float


@dataclass(frozen=True)
class Report:
    """All prompts, and the worst of them."""

    rows: tuple[Nearness, ...]

    @property
    def cosine(self) -> float:
        return min(row.cosine for row in self.rows)

    @property
    def divergence(self) -> float:
        return max(row.divergence for row in self.rows)


def verify(
    original: Original,
    files: Sequence[Path],
    *,
    texts: Sequence[str] = TEXTS,
    images: Sequence[pil.Image] = (),
) -> Report:
    """Compare a model, as it is, with its export read again in float32.

    Args:
        files: what `export.write_gguf` returned: the language half, and the vision half if any.
        images: pictures to read besides the texts; without any, and if the model takes them, one
            of coloured stripes.

    Raises:
        CheckpointError: the export cannot be read.
    """
    vision = files[1] if len(files) > 1 else None
    device = str(next(original.vlm.parameters()).device)
    again = load_gguf(files[0], vision_tower=vision, precision="f32", device=device)
    rows = [_near(text, original, again, text, None) for text in texts]
    if original.processor is not None:
        for number, image in enumerate(images or (_stripes(),)):
            rows.append(_near(f"picture {number + 1}", original, again, texts[0], image))
    return Report(tuple(rows))


def _near(
    prompt: str, original: Original, again: Original, text: str, image: pil.Image | None
) -> Nearness:
    (hidden, ours), (hidden_again, theirs) = (
        _read(model, text, image) for model in (original, again)
    )
    ours, theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
    divergence = F.kl_div(theirs, ours, log_target=True, reduction="none").sum(-1).mean()
    return Nearness(
        prompt,
        torch.cosine_similarity(hidden[-1], hidden_again[-1], dim=0).item(),
        max(0.0, divergence.item()),
        (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
    )


@torch.inference_mode()
def _read(model: Original, text: str, image: pil.Image | None) -> tuple[Tensor, Tensor]:
    """Return final hidden states [T, D] and logits [T, vocab] of a picture and a text."""
    ids = model.tokenizer.encode(text, add_special_tokens=False).ids
    bos = model.specials.bos_id
    encoded = Encoded()
    encoded.add([bos] if model.specials.add_bos and bos is not None else [])
    visuals: tuple[Visual, ...] = ()
    if image is not None:
        assert model.processor is not None
        pixels, shape = pixels_of(Image(image), model.processor, alone=True)
        encoded.add_image(model.vlm.config.image_token_id, count_tokens(model.vlm.config, shape))
        visuals = (Visual(torch.from_numpy(pixels), shape),)
    encoded.add(ids)
    batch = pack([encoded])
    batch.visuals = visuals
    batch = batch.to(next(model.vlm.parameters()).device)
    hidden = model.vlm(batch)[-1]
    return hidden.float(), model.vlm.decoder.logits(hidden)


def _stripes() -> pil.Image:
    """Return a picture with colours, edges and an aspect of its own."""
    across, down = np.meshgrid(np.arange(320), np.arange(240))
    channels = (across * 255 // 319, down * 255 // 239, (across // 16 + down // 16) % 2 * 255)
    return pil.fromarray(np.stack(channels, -1).astype(np.uint8))
