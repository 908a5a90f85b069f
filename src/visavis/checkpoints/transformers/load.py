"""A folder in transformers' layout, loaded whole: weights, tokenizer, chat template, processor.

    config.json  model.safetensors (or shards, or pytorch_model.bin)  tokenizer.json
    chat_template.jinja | chat_template.json | tokenizer_config.json
    preprocessor_config.json | processor_config.json                  with vision only

Each is read by the file that knows it; here they are found and checked against one another.
Executes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visavis.checkpoints.adapters import Adapter, merged
from visavis.checkpoints.checkpoint import Checkpoint, checkpoint_fingerprint
from visavis.checkpoints.quantize import Quantizer
from visavis.checkpoints.tensor_files import MAX_JSON_BYTES, read_json, read_tensors, weight_files
from visavis.checkpoints.transformers.config_reader import Json, section
from visavis.checkpoints.transformers.processor import grids, processor_config
from visavis.checkpoints.transformers.qwen2_vl import qwen2_vl_processor
from visavis.checkpoints.transformers.vision_models import vlm_config
from visavis.checkpoints.transformers.weights import read, vlm_table
from visavis.errors import CheckpointError
from visavis.model.config import Qwen2VLTowerConfig, ViTConfig, VLMConfig
from visavis.processing.images import ImageProcessorConfig
from visavis.processing.prompt_encoder import PromptConfig
from visavis.processing.tokenizer import (
    SpecialTokens,
    has_tokenizer,
    load_tokenizer,
    tokenizer_file,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONFIG_NAME = "config.json"
VIDEO_NAME = "video_preprocessor_config.json"


def load_transformers(
    folder: Path,
    *,
    adapters: Sequence[Adapter] = (),
    precision: str = "auto",
    device: str = "cpu",
) -> Checkpoint:
    """Load a folder in transformers' layout, with adapters merged into it.

    Raises:
        CheckpointError: a file is absent or damaged, or the files do not belong together.
    """
    data = read_json(folder / CONFIG_NAME)
    refuse_quantised(data, folder)
    config = vlm_config(data)
    top = adapters[-1].folder if adapters else folder
    words = words_folder(adapters, folder)
    tokenizer, specials = load_tokenizer(words)
    check_vocabulary(tokenizer, config, words)
    specials = _with_placeholder(tokenizer, specials, config, words)
    processor = image_processor(config, folder)
    _check_tiles(data, config, processor, folder)
    files = weight_files(folder)
    tensors = merged(read_tensors(files), adapters, vlm_table(data, config).canonical)
    files += [file for adapter in adapters for file in adapter.files]
    packing = Quantizer(config, precision, device, where=str(top))
    state = read(data, tensors, where=str(top), convert=packing.take)
    template = chat_template(words)
    identity = data | {"processor": processor.to_dict() if processor else None, "chat": template}
    identity["adapters"] = [adapter.config for adapter in adapters]
    return Checkpoint(
        name=top.resolve().name,
        vlm=packing.build(state),
        tokenizer=tokenizer,
        specials=specials,
        profile=PromptConfig(jinja=template),
        processor=processor,
        fingerprint=checkpoint_fingerprint([tokenizer_file(words), *files], identity),
        files=[folder / CONFIG_NAME, *files],
    )


def words_folder(adapters: Sequence[Adapter], folder: Path) -> Path:
    """Return the folder that has the tokenizer: the outermost adapter's that brings one."""
    places = [*(adapter.folder for adapter in reversed(adapters)), folder]
    return next((place for place in places if has_tokenizer(place)), folder)


def refuse_quantised(data: Json, folder: Path) -> None:
    """Refuse weights that another library quantised.

    Raises:
        CheckpointError: config.json says so.
    """
    if "quantization_config" in data:
        method = data["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise CheckpointError(
            f"{folder} is quantised by {method!r}, expected plain weights; use the unquantised "
            "checkpoint or a GGUF file."
        )


def check_vocabulary(tokenizer: Tokenizer, config: VLMConfig, folder: Path) -> None:
    """Refuse a tokenizer that knows more ids than the model.

    Raises:
        CheckpointError: it does.
    """
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= config.decoder.vocab_size:
        raise CheckpointError(
            f"the tokenizer of {folder} knows the id {largest}, but the embeddings of its model "
            f"have {config.decoder.vocab_size} rows; tokenizer.json belongs to another model."
        )


def _with_placeholder(
    tokenizer: Tokenizer, specials: SpecialTokens, config: VLMConfig, folder: Path
) -> SpecialTokens:
    """Return the special tokens, the placeholders of images and videos among them."""
    by_text = dict(specials.by_text)
    for number in (config.image_token_id, config.video_token_id):
        if number < 0:
            continue
        text = tokenizer.id_to_token(number)
        if text is None:
            raise CheckpointError(
                f"the tokenizer of {folder} has no token {number}, which config.json names as a "
                "placeholder of images or videos; tokenizer.json belongs to another model."
            )
        by_text[text] = number
    return replace(specials, by_text=by_text)


def image_processor(config: VLMConfig, folder: Path) -> ImageProcessorConfig | None:
    """Return how pictures are sized and normalised, if the model takes any.

    Raises:
        CheckpointError: no file says it, or one does that belongs to another tower.
    """
    if config.tower is None:
        return None
    names = ("preprocessor_config.json", "processor_config.json")
    found = [read_json(folder / name) for name in names if (folder / name).is_file()]
    settings = [inner for data in found if (inner := _image_settings(data)) is not None]
    if not settings:
        raise CheckpointError(
            f"{folder} says nowhere how pictures are resized and normalised; expected "
            f"{' or '.join(names)} beside the weights, copy it from the model's source."
        )
    if isinstance(config.tower, Qwen2VLTowerConfig):
        videos = [inner for data in found if (inner := section(data, "video_processor"))]
        if (folder / VIDEO_NAME).is_file():
            videos.insert(0, read_json(folder / VIDEO_NAME))
        return qwen2_vl_processor(settings[0], videos[0] if videos else None, config.tower)
    processor = processor_config(settings[0])
    if isinstance(config.tower, ViTConfig) and processor.size != config.tower.image_size:
        raise CheckpointError(
            f"{folder} prepares pictures of {processor.size} pixels, but its vision tower takes "
            f"{config.tower.image_size}; the processor's file belongs to another model."
        )
    return processor


def _check_tiles(
    data: Json, config: VLMConfig, processor: ImageProcessorConfig | None, folder: Path
) -> None:
    """Refuse pictures tiled in another way than the model puts them together.

    Raises:
        CheckpointError: config.json and the processor's file name other canvases, or only one any.
    """
    tiles = processor.tiles if processor else None
    listed = data.get("image_grid_pinpoints")
    tiled = config.merge.kind == "spatial"
    differ = processor and tiles and listed and grids(listed, processor.size) != tiles.grids
    if differ or tiled != (tiles is not None):
        raise CheckpointError(
            f"{folder} prepares pictures on the canvases {tiles.grids if tiles else 'none'}, but "
            f"its config.json has image_grid_pinpoints {listed if tiled else 'none'}; the "
            "processor's file belongs to another model."
        )


def _image_settings(data: Json) -> Json | None:
    """Return the settings of the image processor in either file, if there are any."""
    inner = data.get("image_processor", data)
    named = isinstance(inner, dict) and (
        "image_processor_type" in inner or "feature_extractor_type" in inner
    )
    return inner if named else None


def chat_template(folder: Path) -> str:
    """Return the source of the chat template, empty if there is none.

    Raises:
        CheckpointError: its file cannot be read.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            with path.open(encoding="utf-8") as file:
                return file.read(MAX_JSON_BYTES)
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot read {path}: {error}; copy the folder again.") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            found: Any = read_json(folder / name).get("chat_template")
            if isinstance(found, list):  # several by name
                named = [one for one in found if isinstance(one, dict)]
                found = next(
                    (one.get("template") for one in named if one.get("name") == "default"), None
                )
            if isinstance(found, str):
                return found
    return ""
