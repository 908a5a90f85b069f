"""A tiny EmbeddingGemma 2, written by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import EmbeddingGemma2Config, EmbeddingGemma2Model, PreTrainedTokenizerFast
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from tests.checkpoints.transformers_files import tokenizer_with_bos
from tests.parity.peers import randomized

TEXT: dict[str, Any] = {
    "vocab_size": 270,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 4,
    "hidden_size_per_layer_input": 16,
    "embedding_dim": 24,
    "sliding_window_pattern": 2,
    "global_head_dim": 12,
    "num_global_key_value_heads": 1,
    "max_position_embeddings": 512,
}
VISION: dict[str, Any] = {
    "model_type": "gemma4_vision",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "patch_size": 4,
    "position_embedding_size": 256,
    "pooling_kernel_size": 2,
}
MARKS = ("<image>", "<boi>", "<eoi>")


class Peer:
    """The same model, tokenizer and image processor in transformers."""

    def __init__(self, folder: Path, **text: Any) -> None:
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer_with_bos(),
            bos_token="<|endoftext|>",
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            additional_special_tokens=list(MARKS),
        )
        self.image, self.start, self.end = self.tokenizer.convert_tokens_to_ids(list(MARKS))
        ids = {"image_token_id": self.image, "video_token_id": 268, "audio_token_id": 269}
        ids |= {"boi_token_id": self.start, "eoi_token_id": self.end}
        config = EmbeddingGemma2Config(text_config=TEXT | text, vision_config=VISION, **ids)
        self.model = EmbeddingGemma2Model(config)
        randomized(self.model)
        with torch.no_grad():
            for number, layer in enumerate(self.model.language_model.layers):
                layer.layer_scalar.fill_(0.7 + 0.2 * number)
        self.images = Gemma4ImageProcessorPil(
            patch_size=VISION["patch_size"], max_soft_tokens=70, pooling_kernel_size=2
        )
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.images.save_pretrained(folder)

    @torch.no_grad()
    def vector(self, text: str = "", images: tuple[Any, ...] = ()) -> tuple[Tensor, list[int]]:
        """Return the unit vector of images and then a text, and the ids that the peer reads."""
        inputs: dict[str, Any] = {}
        ids = self.tokenizer("")["input_ids"]
        if images:
            inputs = dict(self.images(images=list(images), return_tensors="pt"))
            for count in inputs.pop("num_soft_tokens_per_image"):
                ids += [self.start, *[self.image] * int(count), self.end]
        ids += self.tokenizer(text, add_special_tokens=False)["input_ids"]
        found = self.model(input_ids=torch.tensor([ids]), **inputs).last_hidden_state[0].mean(0)
        return torch.nn.functional.normalize(found, dim=-1), ids
