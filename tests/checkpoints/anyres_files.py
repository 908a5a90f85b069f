"""Tiny folders of LLaVA-NeXT and LLaVA-OneVision, written by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    PreTrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from tests.checkpoints.transformers_files import (
    IMAGE_SIZE,
    LLAVA,
    TEXT,
    VISION,
    fast_tokenizer,
)
from tests.parity.peers import randomized

SQUARE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
NUM_PATCHES = (IMAGE_SIZE // VISION["patch_size"]) ** 2
LONG: dict[str, Any] = TEXT | {"max_position_embeddings": 2048}
# As LLaVA-NeXT's, in its order; and OneVision's up to four by four.
NEXT_GRIDS = [[IMAGE_SIZE * a, IMAGE_SIZE * b] for a, b in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
ONEVISION_GRIDS = [[IMAGE_SIZE * a, IMAGE_SIZE * b] for a in range(1, 5) for b in range(1, 5)]
# As published with OneVision.
ONEVISION = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}"
    "{{ '<video>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + content['text'] }}{% endfor %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class ImagesOnly(LlavaOnevisionProcessor):
    """The processor without videos, whose own processor needs torchvision."""

    def check_argument_for_proper_class(self, _: str, argument: Any) -> type:
        return type(argument)


def save_next(
    folder: Path,
    text: PreTrainedConfig | None = None,
    vision: PreTrainedConfig | None = None,
    *,
    select: str = "default",
    layers: int | list[int] = -2,
) -> tuple[LlavaNextForConditionalGeneration, LlavaNextProcessor]:
    """Write a LLaVA-NeXT with its processor; return the peers."""
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE}, crop_size=SQUARE, image_grid_pinpoints=NEXT_GRIDS
        ),
        tokenizer=fast_tokenizer(),
        patch_size=VISION["patch_size"],
        vision_feature_select_strategy=select,
        num_additional_image_tokens=1 if select == "default" else 0,
        chat_template=LLAVA,
    )
    config = LlavaNextConfig(
        text_config=text or LlamaConfig(**LONG),
        vision_config=vision or CLIPVisionConfig(**VISION),
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=NEXT_GRIDS,
        vision_feature_select_strategy=select,
        vision_feature_layer=layers,
    )
    peer = LlavaNextForConditionalGeneration(config)
    randomized(peer)
    peer.save_pretrained(folder)
    processor.save_pretrained(folder)
    return peer, processor


def save_onevision(
    folder: Path, text: PreTrainedConfig | None = None, *, most: int = 9
) -> tuple[LlavaOnevisionForConditionalGeneration, ImagesOnly]:
    """Write a LLaVA-OneVision with its processor; return the peers."""
    tokenizer = fast_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]})
    tokenizer.chat_template = ONEVISION
    processor = ImagesOnly(
        image_processor=LlavaOnevisionImageProcessorPil(
            size=SQUARE, image_grid_pinpoints=ONEVISION_GRIDS
        ),
        tokenizer=tokenizer,
        num_image_tokens=NUM_PATCHES,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=f"anyres_max_{most}",
        chat_template=ONEVISION,
    )
    config = LlavaOnevisionConfig(
        text_config=text or Qwen2Config(**LONG),
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=ONEVISION_GRIDS,
        vision_aspect_ratio=f"anyres_max_{most}",
    )
    peer = LlavaOnevisionForConditionalGeneration(config)
    randomized(peer)
    peer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return peer, processor
