"""Tiny multi-vector models in transformers' layout, and their peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    ColModernVBertConfig,
    ColModernVBertForRetrieval,
    ColModernVBertProcessor,
    ColPaliConfig,
    ColPaliForRetrieval,
    ColPaliProcessor,
    ColQwen2Config,
    ColQwen2ForRetrieval,
    ColQwen2Processor,
    ModernVBertConfig,
    PaliGemmaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLConfig,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.fakes import byte_tokenizer
from tests.parity import qwen2_vl_files as qwen2_vl
from tests.parity.peers import randomized

SIGLIP: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
    "vision_use_head": False,
}


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


def save_colpali(folder: Path, **settings: Any) -> Peer:
    """Write a ColPali with its tokenizer and processor."""
    text = {
        "model_type": "gemma",
        "vocab_size": 1424,  # the processor adds places and segments
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 512,
    }
    bytewise = byte_tokenizer()
    image = bytewise.token_to_id("<image>")
    bytewise.add_special_tokens([AddedToken(text, special=True) for text in ("<bos>", "<pad>")])
    inner = PaliGemmaConfig(
        text_config=text,
        vision_config=SIGLIP,
        image_token_index=image,
        projection_dim=32,
        hidden_size=32,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise,
        bos_token="<bos>",
        pad_token="<pad>",
        eos_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>"},
    )
    images: Any = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    config = ColPaliConfig(vlm_config=inner.to_dict(), **settings)
    return _save(folder, ColPaliForRetrieval(config), ColPaliProcessor(images, tokenizer))


def save_colmodernvbert(folder: Path, **settings: Any) -> Peer:
    """Write a ColModernVBERT whose tokenizer puts marks around a text, with its processor."""
    bytewise = byte_tokenizer()
    names = ["[CLS]", "[SEP]", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    places = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    marks = [AddedToken(name, special=True) for name in (*names, "<|begin_of_text|>", *places)]
    bytewise.add_special_tokens(marks)
    around = [(name, bytewise.token_to_id(name)) for name in names[:2]]
    bytewise.post_processor = TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B", around)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="<|endoftext|>",
    )
    text = {
        "model_type": "modernbert",
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
        "local_attention": 12,
        "pad_token_id": 256,
    }
    vision = SIGLIP | {"hidden_size": 32, "num_attention_heads": 4}
    inner = ModernVBertConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=bytewise.token_to_id("<image>"),
        pixel_shuffle_factor=2,
    )
    cut = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 32}}
    images = Idefics3ImageProcessorPil(**cut)
    config = ColModernVBertConfig(vlm_config=inner.to_dict(), **settings)
    processor = ColModernVBertProcessor(images, tokenizer, image_seq_len=4)
    return _save(folder, ColModernVBertForRetrieval(config), processor)


SAVE: dict[str, Callable[..., Peer]] = {
    "colpali": save_colpali,
    "colqwen2": save_colqwen2,
    "colmodernvbert": save_colmodernvbert,
}
