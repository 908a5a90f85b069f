"""From images and videos to what the decoder reads: hash, cache, decode, vision tower.

    PreparedPrompt ──► known by its content key? ──► FeatureCache ─────────┐
                            └──► decode and resize, in threads ──► tower ──┴──► PackedBatch

A prompt is prepared once (`PromptEncoder`): the file of an image is opened once for its content key
and size, and once more for its pixels where the key is not in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from visavis.memory import enough_memory
from visavis.model.batch import PackedBatch
from visavis.model.image_input import ImageInput
from visavis.model.vlm import TOWER_BATCH, VLM, ImageFeatures
from visavis.processing.collate import pack
from visavis.processing.config import ImageProcessorConfig
from visavis.processing.feature_cache import FeatureCache
from visavis.processing.image_processor import ImageReference, pixels_of
from visavis.processing.images import stamp_of
from visavis.processing.prompt_encoder import PreparedPrompt

Item = TypeVar("Item")
Result = TypeVar("Result")


class ImageEncoder:
    """Encodes the images and videos of prepared prompts; equal ones once.

    Args:
        vlm: the model whose tower and connector encode them.
        processor: how they are sized; None: the model has no vision tower.
        cache: image features by content key; None: a new cache.
    """

    def __init__(
        self, vlm: VLM, processor: ImageProcessorConfig | None, cache: FeatureCache | None = None
    ) -> None:
        self.vlm, self.processor = vlm, processor
        self.cache = FeatureCache() if cache is None else cache

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next(self.vlm.parameters()).device

    def pack(self, prompts: Sequence[PreparedPrompt]) -> PackedBatch:
        """Return prompts as one batch on the model's device, with their image tokens.

        Raises:
            ImageError: an image or video cannot be read.
            OutOfMemoryError: the images do not fit.
        """
        batch = pack(prompts)
        references = [reference for prompt in prompts for reference in prompt.images]
        if references:
            with enough_memory(
                f"looking at {len(references)} pictures and videos", "Use fewer or smaller ones."
            ):
                found = self.encode(references)
            batch.image_tokens = torch.cat([tokens for tokens, _ in found])
            batch.image_counts = tuple(len(tokens) for tokens, _ in found)
            batch.image_means = torch.stack([mean for _, mean in found])
        return batch.to(self.device)

    def encode(self, references: Sequence[ImageReference]) -> list[ImageFeatures]:
        """Return image tokens [n, D] and mean tower feature [W] of each image or video.

        Decoding and resizing run in threads while the tower encodes those before. Features are
        cached by content key, unless a file has changed since its key was computed.

        Raises:
            ImageError: one cannot be read.
        """
        assert self.processor is not None
        processor = self.processor
        found: dict[str, ImageFeatures] = {}
        missing: dict[str, ImageReference] = {}
        for reference in references:
            if (kept := self.cache.get(reference.key)) is not None:
                found[reference.key] = (kept[0].to(self.device), kept[1].to(self.device))
            else:
                missing[reference.key] = reference
        with ThreadPoolExecutor(max_workers=2) as pool:
            for chunk, ready in decode_ahead(
                list(missing.values()),
                lambda one: load_pixels(one, processor),
                pool,
                chunk_size=TOWER_BATCH,
            ):
                inputs = [ImageInput(one.pixels.to(self.device), one.shape) for one in ready]
                # One image at a time on the CPU: its features round the same beside any other.
                parts = [[one] for one in inputs] if self.device.type == "cpu" else [inputs]
                with torch.inference_mode():
                    seen = [features for part in parts for features in self.vlm.see(part)]
                for reference, (tokens, mean) in zip(chunk, seen, strict=True):
                    found[reference.key] = (tokens.clone(), mean.clone())
                    if stamp_of(reference.visual) == reference.content.stamp:
                        self.cache.put(reference.key, found[reference.key])
        return [found[reference.key] for reference in references]


def load_pixels(reference: ImageReference, processor: ImageProcessorConfig) -> ImageInput:
    """Return an image or video decoded and resized for the vision tower.

    Raises:
        ImageError: it cannot be read.
    """
    pixels, grid = pixels_of(reference.visual, processor, reference.is_only_image)
    return ImageInput(torch.from_numpy(pixels), grid)


def decode_ahead(
    items: Sequence[Item], decode: Callable[[Item], Result], pool: Executor, *, chunk_size: int
) -> Iterator[tuple[Sequence[Item], list[Result]]]:
    """Yield chunks of items and their decoded images; the next chunk is decoded meanwhile."""
    chunks = [items[start : start + chunk_size] for start in range(0, len(items), chunk_size)]

    def submit(number: int) -> list[Future[Result]]:
        return [pool.submit(decode, item) for item in chunks[number]] if chunks[number:] else []

    waiting = submit(0)
    for number, chunk in enumerate(chunks):
        ready = [future.result() for future in waiting]
        waiting = submit(number + 1)
        yield chunk, ready
