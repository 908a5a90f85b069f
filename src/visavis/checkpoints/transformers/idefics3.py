"""Idefics3, SmolVLM and SmolVLM2 of transformers: their config.json and image processor as ours.

A SigLIP whose last hidden state passes the final norm, a fold of neighbouring patches and one
linear layer, and any language model of `language_models.py`. Opens no file.
"""

from __future__ import annotations

from typing import Any

from visavis.checkpoints.transformers.config_reader import (
    Json,
    count,
    number,
    require,
    section,
    vit_fields,
    without_nulls,
)
from visavis.checkpoints.transformers.language_models import decoder_config
from visavis.checkpoints.transformers.processor import MAX_TILES, common_fields
from visavis.model.config import ConnectorConfig, ViTConfig, VLMConfig
from visavis.processing.config import MAX_EDGE, ImageProcessorConfig, SplitConfig, VideoConfig

KINDS = ("idefics3", "smolvlm")
CLASSES = ("Idefics3ImageProcessor", "SmolVLMImageProcessor")
VIDEO_CLASS = "SmolVLMVideoProcessor"
PLACEHOLDER = 128257
VISION: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
PROCESSOR: dict[str, Any] = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 1,
    "size": {"longest_edge": 4 * 364},
    "max_image_size": {"longest_edge": 364},
    "do_image_splitting": True,
}
FPS, FRAMES = 1, 64  # of a SmolVLM2 whose files say nothing about videos
# What transformers renders prompts with videos by, whatever template a folder has.
VIDEO_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'] is string %}{{ ': ' + message['content'] }}"
    "{% else %}"
    "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}<image>"
    "{% elif part['type'] == 'video' %}<video>{% endif %}"
    "{% endfor %}{% endif %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def idefics3_config(config: Json) -> VLMConfig:
    """Return the model that a config.json describes.

    Raises:
        CheckpointError: a setting that no part of ours has.
    """
    text = {"model_type": "llama", "rms_norm_eps": 1e-5} | section(config, "text_config")
    outer = config.get("tie_word_embeddings")
    text["tie_word_embeddings"] = bool(text.get("tie_word_embeddings") if outer is None else outer)
    decoder, tower = decoder_config(text), _tower(section(config, "vision_config"))
    fold = count({"scale_factor": 2} | without_nulls(config), "scale_factor")
    require("scale_factor", fold, tower.grid % fold == 0, f"a divisor of {tower.grid} patches")
    found: Any = config.get("image_token_id")
    placeholder = PLACEHOLDER if found is None else found
    known = isinstance(placeholder, int) and 0 <= placeholder < decoder.vocab_size
    require("image_token_id", placeholder, known, f"0 to {decoder.vocab_size - 1}")
    return VLMConfig(
        decoder=decoder,
        tower=tower,
        connector=ConnectorConfig("linear", tower.width, decoder.width, shuffle=fold, bias=False),
        image_token_id=placeholder,
    )


def _tower(vision: Json) -> ViTConfig:
    vision = VISION | without_nulls(vision)
    return ViTConfig(
        **vit_fields(vision),
        ffn_width=count(vision, "intermediate_size"),
        class_token=False,
        patch_bias=True,
        position_buckets=True,
        norm_output=True,
    )


def idefics3_processor(
    image: Json, video: Json | None, *, takes_videos: bool
) -> ImageProcessorConfig:
    """Return how images and videos are cut, sized and normalised.

    Args:
        image: settings of the image processor.
        video: those of the video processor, if a folder has any.
        takes_videos: whether the model does (SmolVLM2).

    Raises:
        CheckpointError: a step that ours does not do.
    """
    config = PROCESSOR | without_nulls(image)
    tile = count(section(config, "max_image_size"), "longest_edge")
    edge = count(section(config, "size"), "longest_edge")
    most = min(MAX_EDGE, MAX_TILES * tile)
    require("size.longest_edge", edge, edge <= most, f"at most {most}")
    cut = config["do_image_splitting"]
    require("do_image_splitting", cut, isinstance(cut, bool), "true or false")
    fields = common_fields(config)
    filmed = config | without_nulls(video or {})
    frames, frame_edge = _video(filmed, tile, fields) if takes_videos else (None, 0)
    split = SplitConfig(edge, cut, frame_edge)
    return ImageProcessorConfig(tile, "split", **fields, split=split, video=frames)


def _video(config: Json, tile: int, fields: Json) -> tuple[VideoConfig, int]:
    """Return which frames of a video are taken, and the pixels of their longer side.

    Args:
        config: settings of videos, and those of images where a folder has no others.
    """
    older = section(config, "video_sampling")
    frames = {"num_frames": older.get("max_frames"), "fps": older.get("fps")}
    frames |= {name: config[name] for name in frames if name in config}
    frames = {"num_frames": FRAMES, "fps": FPS} | without_nulls(frames)
    most, edge = count(frames, "num_frames"), count(section(config, "size"), "longest_edge")
    require("size.longest_edge", edge, edge <= MAX_EDGE, f"at most {MAX_EDGE}")
    square = count(section(config, "max_image_size"), "longest_edge")
    require("max_image_size of videos", square, square == tile, f"{tile}, as of images")
    own = common_fields(config)
    require("the pixels of videos", own, own == fields, f"{fields}, as of images")
    sampled = VideoConfig(most, number(frames, "fps"), max_frames=most, sampling="smolvlm")
    return sampled, edge


def idefics3_json(config: VLMConfig, text: Json) -> dict[str, Any]:
    """Return the config.json of an Idefics3; the inverse of `idefics3_config`.

    Args:
        text: config.json of its language model.
    """
    tower, connector = config.tower, config.connector
    assert isinstance(tower, ViTConfig) and connector is not None
    return {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "model_type": "idefics3",
        "image_token_id": config.image_token_id,
        "scale_factor": connector.shuffle,
        "tie_word_embeddings": config.decoder.tied_head,
        "text_config": dict(text),
        "vision_config": {
            "model_type": "idefics3_vision",
            "hidden_size": tower.width,
            "intermediate_size": tower.ffn_width,
            "num_hidden_layers": tower.num_layers,
            "num_attention_heads": tower.num_heads,
            "image_size": tower.image_size,
            "patch_size": tower.patch_size,
            "hidden_act": {"gelu_tanh": "gelu_pytorch_tanh"}.get(
                tower.activation, tower.activation
            ),
            "layer_norm_eps": tower.norm_eps,
        },
    }


def split_json(config: ImageProcessorConfig) -> dict[str, Any]:
    """Return the settings of an image processor beyond those that all of them have."""
    split = config.split
    assert split is not None
    return {
        "image_processor_type": CLASSES[bool(split.video_edge)],
        "size": {"longest_edge": split.longest_edge},
        "max_image_size": {"longest_edge": config.size},
        "do_image_splitting": split.cut,
        "do_pad": True,
    }


def split_video_json(config: ImageProcessorConfig, image: Json) -> dict[str, Any]:
    """Return the settings of a video processor.

    Args:
        image: those of the image processor.
    """
    split, video = config.split, config.video
    assert split is not None and video is not None
    kept = {name: image[name] for name in image if name != "do_image_splitting"}
    del kept["image_processor_type"]
    return kept | {
        "video_processor_type": VIDEO_CLASS,
        "size": {"longest_edge": split.video_edge},
        "num_frames": video.frames,
        "fps": video.fps,
    }
