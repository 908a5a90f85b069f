"""Tiny multi-vector models in transformers' layout, and their peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    ColQwen2Config,
    ColQwen2ForRetrieval,
    ColQwen2Processor,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2VLConfig,
)

from tests.parity import qwen2_vl_files as qwen2_vl
from tests.parity.peers import randomized


@dataclass(frozen=True)
class Peer:
    """A stock model with its processor."""

    model: PreTrainedModel
    processor: Any

    @torch.no_grad()
    def embed(self, item: Any, *, grid: bool = True) -> np.ndarray:
        """Return the vectors of a text, as a query, or of an image.

        Args:
            grid: give Qwen2-VL the positions on three axes, which its stock class leaves out.
        """
        if isinstance(item, str):
            inputs = self.processor.process_queries([item])
        else:
            inputs = self.processor.process_images([item])
            inputs.pop("labels", None)
            if grid and "image_grid_thw" in inputs:
                inputs["position_ids"] = self._positions(inputs)
        found: Tensor = self.model(**inputs).embeddings[0]
        return found.numpy()

    def _positions(self, inputs: Any) -> Tensor:
        types = (inputs["input_ids"] == qwen2_vl.IMAGE).int()
        names = ("input_ids", "image_grid_thw", "attention_mask")
        settings = {name: inputs[name] for name in names}
        found: Tensor = self.model.vlm.get_rope_index(mm_token_type_ids=types, **settings)[0]
        return found

    def ids(self, item: Any) -> list[int]:
        """Return the token ids of a query or an image."""
        process = self.processor.process_queries
        process = process if isinstance(item, str) else self.processor.process_images
        found: list[int] = process([item])["input_ids"][0].tolist()
        return found


def save_colqwen2(folder: Path, **settings: Any) -> Peer:
    """Write a ColQwen2 with its tokenizer and processor."""
    inner = Qwen2VLConfig(
        text_config=qwen2_vl.SIZES,
        vision_config=qwen2_vl.VISION,
        image_token_id=qwen2_vl.IMAGE,
        video_token_id=qwen2_vl.VIDEO,
        vision_start_token_id=qwen2_vl.START,
        vision_end_token_id=qwen2_vl.END,
    )
    config = ColQwen2Config(vlm_config=inner.to_dict(), **settings)
    processor = ColQwen2Processor(qwen2_vl.PROCESSOR, qwen2_vl.tokenizer())
    return _save(folder, ColQwen2ForRetrieval(config), processor)


def _save(folder: Path, model: PreTrainedModel, processor: ProcessorMixin) -> Peer:
    randomized(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Peer(model, processor)


SAVE: dict[str, Callable[..., Peer]] = {"colqwen2": save_colqwen2}
