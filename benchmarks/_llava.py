"""A LLaVA of random numbers in transformers' layout, of any size, that reads bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BARE = (  # nothing around words and pictures, as our profile of such a model embeds them
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
)


def write_llava(place: Path, text: dict[str, Any], vision: dict[str, Any]) -> None:
    """Write model, tokenizer and processor.

    Args:
        text, vision: sizes, by the names of transformers' configs.
    """
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=LlamaConfig(
            **text, vocab_size=tokenizer.get_vocab_size(), tie_word_embeddings=False
        ),
        vision_config=CLIPVisionConfig(**vision),
        image_token_index=tokenizer.token_to_id("<image>"),
    )
    Llava(config).save_pretrained(place)
    tokenizer.save(str(place / "tokenizer.json"))
    size = vision["image_size"]
    files: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "</s>",
            "padding_side": "right",
            "add_bos_token": False,
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "patch_size": vision["patch_size"],
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,  # the class's
            "image_token": "<image>",
        },
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": size},
            "crop_size": {"height": size, "width": size},
        },
    }
    for name, content in files.items():
        (place / name).write_text(json.dumps(content), encoding="utf-8")
    (place / "chat_template.jinja").write_text(BARE, encoding="utf-8")
