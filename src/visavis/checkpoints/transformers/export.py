"""Export to transformers' layout, the chat format as a jinja chat template included.

The template takes a message's content as one text or as a list of images and texts, and writes an
image as its placeholder. Makes text; renders nothing.
"""

from __future__ import annotations

import copy
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken
from torch import Tensor

from visavis.checkpoints.checkpoint import (
    Checkpoint,
    Written,
    whole_state,
    write_json,
    write_tensors,
    write_words,
)
from visavis.checkpoints.transformers.export_config import (
    ARCHITECTURES,
    config_json,
    inexpressible,
)
from visavis.checkpoints.transformers.export_dual import write_dual_encoder
from visavis.checkpoints.transformers.export_gemma import write_gemma
from visavis.checkpoints.transformers.export_multi_vector import write_multi_vector
from visavis.checkpoints.transformers.export_processor import pinpoints, processor_json
from visavis.checkpoints.transformers.export_qwen_vl import qwen_vl_json, qwen_vl_processors
from visavis.checkpoints.transformers.idefics3 import KINDS as IDEFICS3
from visavis.checkpoints.transformers.idefics3 import split_video_json
from visavis.checkpoints.transformers.internvl import KIND as INTERNVL
from visavis.checkpoints.transformers.internvl import TOKENS, ratio_video_json
from visavis.checkpoints.transformers.llava_onevision15 import KIND as ONEVISION_15
from visavis.checkpoints.transformers.qwen2_vl import KIND_2_5 as QWEN2_5_VL
from visavis.checkpoints.transformers.qwen3_vl import KIND as QWEN3_VL
from visavis.checkpoints.transformers.weights import write
from visavis.model.config import (
    DecoderConfig,
    Qwen2VLTowerConfig,
    RopeScaling,
    ViTConfig,
    VLMConfig,
)
from visavis.model.image_tokens import tokens_per_view
from visavis.model.rope import Rope
from visavis.processing.chat_formats import CHAT_FORMATS, ChatFormat, Turn
from visavis.processing.config import ImageProcessorConfig
from visavis.processing.prompt_config import PromptConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def chat_jinja(template: ChatFormat, image: str = "", video: str = "") -> str:
    """Return the source of a template that writes the same text; empty if none can.

    Args:
        image, video: what stands for one, within what the format writes around it; empty: the
            model takes none.
    """
    if any(turn.images_only for turn in template.turns.values()):
        return ""  # a template that drops words would be taken for a broken one
    visuals = [
        f"{{%- {keyword} part['type'] == '{kind}' -%}}"
        + _text(template.image_start + token + template.image_end)
        for keyword, kind, token in (("if", "image", image), ("elif", "video", video))
        if token
    ]
    text = "{{- part['text'] -}}"
    lines = [
        "{%- macro body(content) -%}",
        "{%- if content is string -%}{{- content -}}",
        "{%- else -%}{%- for part in content -%}",
        *([*visuals, "{%- else -%}", text, "{%- endif -%}"] if visuals else [text]),
        "{%- endfor -%}{%- endif -%}",
        "{%- endmacro -%}",
    ]
    if template.before:
        lines.append(_text(template.before))
    if template.system:
        lines += [
            "{%- if not messages or messages[0]['role'] != 'system' -%}",
            "{%- set messages = [{'role': 'system', 'content': "
            f"{json.dumps(template.system)}}}] + messages -%}}",
            "{%- endif -%}",
        ]
    lines += [
        "{%- set state = namespace(asked=false) -%}",
        "{%- for message in messages -%}",
    ]
    opening = "if"
    if template.first_user is not None:
        lines.append("{%- if message['role'] == 'user' and not state.asked -%}")
        lines += [*_turn(template.first_user), "{%- set state.asked = true -%}"]
        opening = "elif"
    for role, turn in template.turns.items():
        lines += [f"{{%- {opening} message['role'] == '{role}' -%}}", *_turn(turn)]
        opening = "elif"
    roles = ", ".join(template.turns)
    lines += [
        "{%- else -%}",
        f"{{{{- raise_exception('roles are {roles}') -}}}}",
        "{%- endif -%}",
        "{%- endfor -%}",
        f"{{%- if add_generation_prompt -%}}{_text(template.turns['assistant'].start)}"
        "{%- endif -%}",
    ]
    return "\n".join(lines) + "\n"


def taking_parts(source: str, image: str, video: str = "") -> str:
    """Return a template that takes a message's content as one text or as a list of images and
    texts, made of a language model's template, which takes one text.

    Args:
        image, video: the placeholder of one; empty: the model takes none.
    """
    visuals = "".join(
        f"{{%- {keyword} part['type'] == '{kind}' -%}}{_text(token)}"
        for keyword, kind, token in (("if", "image", image), ("elif", "video", video))
        if token
    )
    return (
        "{%- macro joined(content) -%}\n"
        "{%- for part in content -%}\n"
        f"{visuals}{{%- else -%}}{{{{- part['text'] -}}}}{{%- endif -%}}\n"
        "{%- endfor -%}\n"
        "{%- endmacro -%}\n"
        "{%- set whole = namespace(messages=[]) -%}\n"
        "{%- for message in messages -%}\n"
        "{%- set content = message['content'] -%}\n"
        "{%- if content and content is sequence and content is not string -%}\n"
        "{%- set message = dict(message, content=joined(content)) -%}\n"
        "{%- set whole.messages = whole.messages + [message] -%}\n"
        "{%- else -%}\n"
        "{%- set whole.messages = whole.messages + [message] -%}\n"
        "{%- endif -%}\n"
        "{%- endfor -%}\n"
        "{%- set messages = whole.messages %}\n"  # white space after it belongs to the source
    ) + source


def _turn(turn: Turn) -> list[str]:
    pieces = [
        _text(turn.start + turn.gap),
        "{{- body(message['content']) -}}",
        _text(turn.end + turn.after),
    ]
    return [piece for piece in pieces if piece]


def _text(text: str) -> str:
    """Return jinja that writes a text as it is."""
    return f"{{{{- {json.dumps(text)} -}}}}" if text else ""


IMAGE_TOKEN, VIDEO_TOKEN = "<image>", "<video>"  # what a model without placeholders gets
ROWS = 64  # embeddings grow to a multiple of so many rows, as the library's converters do
TILES = {"llava_next": "tile", "llava_onevision": "pad"}  # of several pictures
LLAMA_3 = RopeScaling("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
# Of a profile: in the template, or known of the model type.
IN_TEMPLATE = ("chat_template", "jinja", "image_start", "image_end")
KNOWN = ("image_text", "video_jinja")  # of Idefics3 and InternVL
PROCESSORS = {
    "llava": "LlavaProcessor",
    "llava_next": "LlavaNextProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
    "idefics3": "Idefics3Processor",
    "smolvlm": "SmolVLMProcessor",
    "internvl": "InternVLProcessor",
}


def write_transformers(loaded: Checkpoint, folder: Path, *, progress: bool = False) -> Written:
    """Write a loaded model; all tensors in the type that its matmuls compute in.

    Raises:
        CheckpointError: a part that no stock class has; it is named.
    """
    if loaded.vlm.config.is_dual:
        return write_dual_encoder(loaded, folder, progress=progress)
    if loaded.vlm.config.multi_vector_dim:
        return write_multi_vector(loaded, folder, progress=progress)
    if not loaded.vlm.config.has_decoder:
        return write_gemma(loaded, folder, progress=progress)
    state, config = library_norms(whole_state(loaded.vlm), loaded.vlm.config)
    tokenizer = loaded.tokenizer
    if config.tower is not None and not has_placeholder(loaded):
        tokenizer, state, config = with_placeholders(tokenizer, state, config)
    any_size = isinstance(config.tower, Qwen2VLTowerConfig)
    data = qwen_vl_json(config) if any_size else config_json(config)
    processor = loaded.processor
    if processor is not None and processor.tiles is not None:
        data["image_grid_pinpoints"] = pinpoints(processor.tiles)
    if data["model_type"] == "idefics3" and processor is not None and processor.video is not None:
        data |= {"model_type": "smolvlm", "architectures": [ARCHITECTURES["smolvlm"]]}
    dtype = loaded.vlm.decoder.dtype
    specials = loaded.specials
    data |= {
        "bos_token_id": specials.bos_id,
        "eos_token_id": specials.eos_id,
        "pad_token_id": specials.pad_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if config.tower is not None:  # else each family's default, which may not be in the vocabulary
        data["text_config"] |= {name: data[name] for name in data if name.endswith("_token_id")}
    image, video = (
        (tokenizer.id_to_token(number) or "") if config.tower is not None and number >= 0 else ""
        for number in (config.image_token_id, config.video_token_id)
    )
    files = [write_json(folder / "config.json", data)]
    files += write_words(
        folder,
        tokenizer,
        specials,
        context_length=config.decoder.context_length,
        image_token=image,
        video_token=video,
        tokens=TOKENS if data["model_type"] == INTERNVL else {},
    )
    template = chat_template(loaded.profile, image, video)
    if image and loaded.profile.jinja and template == loaded.profile.jinja:
        own = loaded.encoder.template
        template = template if own.takes_parts(image) else taking_parts(template, image, video)
    if template:
        files.append(folder / "chat_template.jinja")
        files[-1].write_text(template, encoding="utf-8")
    lost = lost_settings(loaded.profile)
    if data["model_type"] in (*IDEFICS3, INTERNVL, QWEN3_VL):
        lost = [one for one in lost if not one.startswith(KNOWN)]
    if config.tower is not None:
        assert processor is not None
        lost += ["videos"] if processor.video and not (video or loaded.profile.image_text) else []
        settings = _processors(data, config, processor, image, video)
        files += [write_json(folder / name, one) for name, one in settings.items()]
    files += write_tensors(folder, write(data, state), dtype=dtype, progress=progress)
    return Written(files, lost)


def library_norms(
    state: dict[str, Tensor], config: VLMConfig
) -> tuple[dict[str, Tensor], VLMConfig]:
    """Return a model from a GGUF file as the library spells it: Gemma's norms without the 1 that
    its file adds, Llama 3's rotary stretch by its rule instead of its numbers."""
    decoder = replace(config.decoder, rope_scaling=_by_rule(config.decoder))
    if decoder.embedding_scale != 1 and not decoder.norm_offset:
        decoder = replace(decoder, norm_offset=1.0)
        state = {
            name: tensor - 1 if name.startswith("decoder.") and "norm.weight" in name else tensor
            for name, tensor in state.items()
        }
    return state, replace(config, decoder=decoder)


def _by_rule(config: DecoderConfig) -> RopeScaling | None:
    """Return the rule that gives a stretch that is listed frequency by frequency, if one does."""
    listed = config.rope_scaling
    if listed is None or listed.kind != "factors" or listed.magnitude != 1:
        return listed
    rule = replace(LLAMA_3, factor=round(max(listed.factors), 3))
    ours, theirs = (Rope(replace(config, rope_scaling=s)).frequencies for s in (listed, rule))
    return rule if torch.allclose(ours, theirs, rtol=1e-5) else listed


def has_placeholder(loaded: Checkpoint) -> bool:
    """Return whether the image placeholder is a token of its own: LLaVA's original layout has
    none, there its id is 0; a composed model has the padding token, which may end turns too."""
    number, specials = loaded.vlm.config.image_token_id, loaded.specials
    taken = {specials.bos_id, specials.eos_id, specials.pad_id, *specials.eot_ids}
    return (
        number > 0 and number not in taken and number in loaded.tokenizer.get_added_tokens_decoder()
    )


def with_placeholders(
    tokenizer: Tokenizer, state: dict[str, Tensor], config: VLMConfig
) -> tuple[Tokenizer, dict[str, Tensor], VLMConfig]:
    """Return a model that has the token `<image>`, OneVision's `<video>` too, and embeddings.

    Rows that are new hold the mean of the others: images overwrite a placeholder's embedding,
    and an output of mean size is never the likeliest.
    """
    tokenizer = copy.deepcopy(tokenizer)
    texts = [IMAGE_TOKEN, *([VIDEO_TOKEN] if config.merge.max_tiles else [])]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in texts])
    known = tokenizer.get_vocab()
    ids = [known[text] for text in texts]
    rows = config.decoder.vocab_size
    if max(ids) >= rows:
        rows = -(-(max(ids) + 1) // ROWS) * ROWS
        names = ("decoder.embed.weight", "decoder.head.weight", "decoder.head.bias")
        state = state | {name: _grown(state[name], rows) for name in names if name in state}
    decoder = replace(config.decoder, vocab_size=rows)
    image, video = (*ids, -1)[:2]
    config = replace(config, decoder=decoder, image_token_id=image, video_token_id=video)
    return tokenizer, state, config


def chat_template(profile: PromptConfig, image: str, video: str = "") -> str:
    """Return the source of a profile's chat template, empty if it has none."""
    if not profile.chat_template:
        return profile.jinja
    image, video = (
        profile.image_start + token + profile.image_end if token else "" for token in (image, video)
    )
    return chat_jinja(CHAT_FORMATS[profile.chat_template], image, video)


def lost_settings(profile: PromptConfig) -> list[str]:
    """Return the settings of a profile that config.json and its neighbours have no place for."""
    default = PromptConfig()
    lost = [
        f"{f.name}={value!r}"
        for f in fields(profile)
        if f.name not in IN_TEMPLATE
        and (value := getattr(profile, f.name)) != getattr(default, f.name)
    ]
    if profile.chat_template and not chat_jinja(CHAT_FORMATS[profile.chat_template]):
        lost.append(f"the chat format {profile.chat_template!r}")
    return lost


def _processors(
    data: dict[str, Any],
    config: VLMConfig,
    processor: ImageProcessorConfig,
    image: str,
    video: str,
) -> dict[str, dict[str, Any]]:
    """Return the files that say how images are prepared, by their names.

    Raises:
        CheckpointError: the library's class prepares them otherwise.
    """
    if isinstance(config.tower, Qwen2VLTowerConfig):
        kind = QWEN2_5_VL if data["model_type"] == ONEVISION_15 else data["model_type"]
        return qwen_vl_processors(processor, config, kind)
    settings = processor_json(processor)
    _check_tiles(data["model_type"], processor)
    whole = _processor(data, config, image, video)
    files = {"preprocessor_config.json": settings, "processor_config.json": whole}
    if processor.split is not None and processor.split.video_edge:
        files["video_preprocessor_config.json"] = split_video_json(processor, settings)
    if processor.ratio is not None:
        files["video_preprocessor_config.json"] = ratio_video_json(processor, settings)
    return files


def _check_tiles(kind: str, processor: ImageProcessorConfig) -> None:
    """Refuse tiles that the class would not put together so, or would not cut.

    Raises:
        CheckpointError: it would not.
    """
    tiles = processor.tiles
    if (None if tiles is None else tiles.multi_image) != TILES.get(kind):
        way = f"{processor.resize}" + (f", several: {tiles.multi_image}" if tiles else "")
        raise inexpressible(f"the sizing of pictures ({way})", f"{PROCESSORS[kind]} has another")


def _grown(tensor: Tensor, rows: int) -> Tensor:
    mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
    more = mean.expand(rows - len(tensor), *tensor.shape[1:])
    return torch.cat((tensor, more))


def _processor(data: dict[str, Any], config: VLMConfig, image: str, video: str) -> dict[str, Any]:
    """Return processor_config.json: how many placeholders an image becomes."""
    if data["model_type"] in (*IDEFICS3, INTERNVL):
        name = "image_seq_length" if data["model_type"] == INTERNVL else "image_seq_len"
        kind = PROCESSORS[data["model_type"]]
        return {"processor_class": kind, name: tokens_per_view(config)}
    tower = config.tower
    assert isinstance(tower, ViTConfig)
    found: dict[str, Any] = {
        "processor_class": PROCESSORS[data["model_type"]],
        "image_token": image,
        "vision_feature_select_strategy": data["vision_feature_select_strategy"],
    }
    if data["model_type"] == "llava_onevision":
        aspect = data["vision_aspect_ratio"]
        return found | {
            "video_token": video,
            "num_image_tokens": tower.grid**2,
            "vision_aspect_ratio": aspect,
        }
    extra = {"patch_size": tower.patch_size, "num_additional_image_tokens": tower.num_prefix_tokens}
    return found | extra
