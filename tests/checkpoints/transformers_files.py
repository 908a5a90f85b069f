"""Tiny folders in transformers' layout, written by transformers itself, for tests of loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, processors
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.fakes import byte_tokenizer
from tests.parity.peers import randomized

IMAGE_SIZE = 32
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": IMAGE_SIZE,
    "patch_size": 8,
}
TEXT: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 258,
    "pad_token_id": 256,
}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As published with LLaVA 1.5 in this layout, less its marks of what is generated.
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def tokenizer_with_bos() -> Tokenizer:
    """The byte tokenizer, putting <|endoftext|> in front as Llama's puts <s>."""
    tokenizer = byte_tokenizer()
    bos = ("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[bos[0], "$A"], pair=[bos[0], "$A", "$B"], special_tokens=[bos]
    )
    return tokenizer


def fast_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_with_bos(),
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>"},
    )


def save_qwen2(
    folder: Path,
    *,
    max_shard_size: str = "1GB",
    dtype: torch.dtype = torch.float32,
    **sizes: int,
) -> PreTrainedModel:
    """Write a text-only model with tokenizer and chat template; return the peer."""
    peer = Qwen2ForCausalLM(Qwen2Config(**TEXT | sizes))
    randomized(peer)
    peer.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer = fast_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return peer


def save_llava(
    folder: Path,
    text: PreTrainedConfig | None = None,
    vision: PreTrainedConfig | None = None,
    image_processor: Any = None,
    *,
    select: str = "default",
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Write a LLaVA with its processor; return the peers."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = LlavaProcessor(
        image_processor=image_processor
        or CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size),
        tokenizer=fast_tokenizer(),
        patch_size=VISION["patch_size"],
        vision_feature_select_strategy=select,
        num_additional_image_tokens=1 if select == "default" else 0,
        chat_template=LLAVA,
    )
    config = LlavaConfig(
        text_config=text or Qwen2Config(**TEXT),
        vision_config=vision or CLIPVisionConfig(**VISION),
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy=select,
    )
    peer = LlavaForConditionalGeneration(config)
    randomized(peer)
    peer.save_pretrained(folder)
    processor.save_pretrained(folder)
    return peer, processor
