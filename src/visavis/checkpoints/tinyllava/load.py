"""A TinyLLaVA folder, loaded whole: what one training stage wrote, or a repository of the hub.

    config.json  weights  tokenizer                           a repository, of either generation
    config.json  language_model/  vision_tower/  connector/   a stage: each part's own weights
    the same with adapter_config.json and its weights         a LoRA stage: merged here

Which it is, the files say. Executes nothing and fetches nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visavis.checkpoints.adapters import Adapter, is_adapter, merged, read_adapter
from visavis.checkpoints.checkpoint import Checkpoint, checkpoint_fingerprint
from visavis.checkpoints.quantize import Quantizer
from visavis.checkpoints.tensor_files import (
    StoredTensor,
    TensorFiles,
    read_headers,
    read_json,
    weight_files,
)
from visavis.checkpoints.tinyllava.config import (
    DINOV2_PIXELS,
    OLD_PLACES,
    PLACES,
    TURNS_SETTING,
    Places,
    image_processor,
    is_old,
    modern,
    name_table,
    text_config,
    turns_of,
    vision_configs,
    vlm_config,
)
from visavis.checkpoints.transformers.config_reader import Json, require
from visavis.checkpoints.transformers.load import (
    CONFIG_NAME,
    check_vocabulary,
    refuse_quantised,
    words_folder,
)
from visavis.checkpoints.transformers.processor import processor_config
from visavis.checkpoints.transformers.vision_models import vit_config
from visavis.checkpoints.transformers.weights import read_as
from visavis.checkpoints.weight_mapping import NameTable
from visavis.errors import CheckpointError
from visavis.model.config import VLMConfig
from visavis.model.vision.vit import resize_positions
from visavis.processing.chat_formats import CHAT_FORMATS
from visavis.processing.images import ImageProcessorConfig
from visavis.processing.prompt_encoder import PromptConfig
from visavis.processing.tokenizer import load_tokenizer, tokenizer_file

PROCESSOR = "preprocessor_config.json"
PARTS = {  # folders of a stage -> where their tensors' names hang in a repository
    "language_model": "language_model.",
    "vision_tower": "vision_tower._vision_tower.",
    "connector": "connector.",
}
POSITIONS = "embeddings.position_embeddings"  # of a DINOv2


def load_tinyllava(
    folder: Path,
    *,
    adapters: Sequence[Adapter] = (),
    precision: str = "auto",
    device: str = "cpu",
) -> Checkpoint:
    """Load a repository or a stage, adapters merged.

    Raises:
        CheckpointError: a file is absent or damaged, or the files do not belong together.
    """
    found = open_tinyllava(folder, adapters=adapters)
    config, top = found.config, adapters[-1].folder if adapters else folder
    words = words_folder(adapters, folder)
    tokenizer, specials = load_tokenizer(words)
    check_vocabulary(tokenizer, config, words)
    packing = Quantizer(config, precision, device, where=str(folder))
    state = read_as(config, found.table, found.tensors, where=str(folder), convert=packing.take)
    identity: dict[str, Any] = {"config": found.data, "processor": found.processor.to_dict()}
    identity["adapters"] = [one.config for one in found.adapters]
    return Checkpoint(
        name=top.resolve().name,
        vlm=packing.build(state),
        tokenizer=tokenizer,
        specials=specials,
        profile=PromptConfig(chat_template=found.chat_template),
        processor=found.processor,
        fingerprint=checkpoint_fingerprint([tokenizer_file(words), *found.files], identity),
        files=[folder / CONFIG_NAME, *found.files],
    )


@dataclass(frozen=True)
class Opened:
    """A folder with all its parts found and no tensor read.

    Attributes:
        data: config.json, an older repository's as the Factory would have it.
        tensors: by the layout's names, adapters merged.
        chat_template: the chat format, empty if nothing settles it.
    """

    data: Json
    text: Json
    config: VLMConfig
    processor: ImageProcessorConfig
    tensors: TensorFiles
    table: NameTable
    adapters: Sequence[Adapter]
    files: list[Path]
    chat_template: str


def open_tinyllava(folder: Path, *, adapters: Sequence[Adapter] = ()) -> Opened:
    """Find the parts of a model; see `load_tinyllava`.

    Raises:
        CheckpointError: a file is absent or damaged, or the files do not belong together.
    """
    data: Json = read_json(folder / CONFIG_NAME)
    refuse_quantised(data, folder)
    old = is_old(data)
    if old:
        data = modern(data)
    places = OLD_PLACES if old else PLACES
    text, visions = text_config(data), vision_configs(data)
    processor = _processor(folder, data, visions[0])
    config = vlm_config(data, text, visions, processor.size)
    table = name_table(text, visions, config, places)
    entries, files, is_stage = _tensors(folder)
    if is_adapter(folder):
        adapters = (read_adapter(folder), *adapters)
    _fit(entries, visions, processor.size, places)
    if old and config.decoder.head_bias and "lm_head.weight" in entries:
        # the older Phi's output layer has none, and nothing says so
        rows = entries["lm_head.weight"].shape[:1]
        zeros = StoredTensor(torch.float32, rows, partial(torch.zeros, rows))
        entries.setdefault("lm_head.bias", zeros)
    tensors = merged(TensorFiles(entries), adapters, table.canonical)
    return Opened(
        data=data,
        text=text,
        config=config,
        processor=processor,
        tensors=tensors,
        table=table,
        adapters=adapters,
        files=[*files, *(file for adapter in adapters for file in adapter.files)],
        chat_template=_turns(data, text, captions=is_stage and not is_adapter(folder)),
    )


def _tensors(folder: Path) -> tuple[dict[str, StoredTensor], list[Path], bool]:
    """Return a folder's tensors by a repository's names, their files, and whether each part had
    a folder of its own."""
    if not any((folder / part).is_dir() for part in PARTS):
        files = weight_files(folder)
        return dict(read_headers(files)), files, False
    absent = [part for part in PARTS if not (folder / part).is_dir()]
    if absent:
        raise CheckpointError(
            f"{folder} lacks the folder {', '.join(absent)}, expected {', '.join(PARTS)} beside "
            "one another, as TinyLLaVA writes them; copy what is missing."
        )
    entries: dict[str, StoredTensor] = {}
    files = []
    for part, prefix in PARTS.items():
        own = weight_files(folder / part)
        files += own
        for name, stored in read_headers(own).items():  # a LoRA stage's linears are wrapped
            entries[prefix + name.replace(".base_layer.", ".")] = stored
    return entries, files, True


def _processor(folder: Path, data: Json, vision: Json) -> ImageProcessorConfig:
    """Return how pictures are sized and normalised: the first tower's own way."""
    dino = str(vision["model_type"]).startswith("dinov2")
    size = DINOV2_PIXELS if dino else vit_config(vision).image_size
    path = folder / PROCESSOR
    found = read_json(path) if path.is_file() else image_processor(vision, size)
    processor = processor_config(found)
    if not dino and processor.size != size:
        raise CheckpointError(
            f"{path} prepares pictures of {processor.size} pixels, but the vision tower takes "
            f"{size}; it belongs to another model."
        )
    if data.get("image_aspect_ratio") != "pad" or processor.resize == "pad":
        return processor
    whole = processor.crop_fraction == 1
    require("crop_size", processor.size, whole, "the shortest edge, for padded pictures")
    return replace(processor, resize="pad")


def _fit(
    entries: dict[str, StoredTensor], visions: Sequence[Json], size: int, places: Places
) -> None:
    """Bring a DINOv2's learned positions to the size of the pictures, in place.

    The original does so for every picture.
    """
    for vision in visions:
        if not vision["model_type"].startswith("dinov2"):
            continue
        tower = vit_config(vision)
        grid = size // tower.patch_size
        name = places.tower + ("dinov2." if len(visions) == 2 else "") + POSITIONS
        stored = entries.get(name)
        if stored is not None and stored.shape == (1, 1 + tower.grid**2, tower.width):
            shape = (1, 1 + grid**2, tower.width)
            entries[name] = StoredTensor(stored.dtype, shape, partial(_resized, stored, grid))


def _resized(stored: StoredTensor, grid: int) -> Tensor:
    positions = stored()[0]
    patches = resize_positions(positions[1:], grid, antialias=False)
    return torch.cat((positions[:1], patches))[None]


def _turns(data: Json, text: Json, *, captions: bool) -> str:
    """Return the chat format. A stage may have seen captions only: what it was, no file says."""
    named = data.get(TURNS_SETTING)
    if isinstance(named, str) and (named in CHAT_FORMATS or not named):
        return named
    return "" if captions else turns_of(data, text)
