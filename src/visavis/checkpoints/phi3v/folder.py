"""A folder of Phi-3-vision or Phi-3.5-vision, loaded whole, adapters merged into it.

    config.json  weights  tokenizer.json  tokenizer_config.json  preprocessor_config.json

An adapter may bring its own tokenizer and preprocessor_config.json. The code that lies beside the
published weights is not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visavis.checkpoints.adapters import Adapter, merged
from visavis.checkpoints.loaded import Loaded, fingerprint
from visavis.checkpoints.names import NameTable
from visavis.checkpoints.packing import Packing
from visavis.checkpoints.phi3v.layout import image_processor, name_table, vlm_config
from visavis.checkpoints.transformers.folder import (
    CONFIG_NAME,
    check_vocabulary,
    refuse_quantised,
    words_folder,
)
from visavis.checkpoints.transformers.layout import read_as
from visavis.checkpoints.transformers.settings import Json
from visavis.checkpoints.weight_files import (
    TensorFiles,
    read_json,
    read_tensors,
    weight_files,
)
from visavis.errors import CheckpointError
from visavis.model.config import VLMConfig
from visavis.processing.images import ImageProcessorConfig
from visavis.processing.profile import PromptProfile
from visavis.processing.tokenizer import load_tokenizer, tokenizer_file

PROCESSOR = "preprocessor_config.json"


def load_phi3v(
    folder: Path,
    *,
    adapters: Sequence[Adapter] = (),
    precision: str = "auto",
    device: str = "cpu",
) -> Loaded:
    """Load a checkpoint, with adapters merged into it.

    Raises:
        CheckpointError: a file is absent or damaged, or the files do not belong together.
    """
    found = open_phi3v(folder, adapters)
    config, processor = found.config, found.processor
    top = adapters[-1].folder if adapters else folder
    words = words_folder(adapters, folder)
    tokenizer, specials = load_tokenizer(words)
    check_vocabulary(tokenizer, config, words)
    packing = Packing(config, precision, device, where=str(top))
    state = read_as(config, found.table, found.tensors, where=str(top), convert=packing.take)
    # The published processor tokenises what stands between images piece by piece, so that
    # beginning-of-sequence stands after each image too.
    repeated = specials.bos_id if specials.add_bos else None
    bos = "" if repeated is None else tokenizer.id_to_token(repeated) or ""
    identity: dict[str, Any] = {**found.data, "processor": processor.to_dict()}
    identity["adapters"] = [adapter.config for adapter in adapters]
    return Loaded(
        name=top.resolve().name,
        vlm=packing.build(state),
        tokenizer=tokenizer,
        specials=specials,
        profile=PromptProfile(turns="phi3_v", image_end=bos),
        processor=processor,
        fingerprint=fingerprint([tokenizer_file(words), *found.files], identity),
        files=[folder / CONFIG_NAME, *found.files],
    )


@dataclass(frozen=True)
class Opened:
    """A folder with all its parts found and no tensor read.

    Attributes:
        tensors: by the layout's names, adapters in them.
    """

    data: Json
    config: VLMConfig
    processor: ImageProcessorConfig
    tensors: TensorFiles
    table: NameTable
    files: list[Path]


def open_phi3v(folder: Path, adapters: Sequence[Adapter] = ()) -> Opened:
    """Find the parts of a model; see `load_phi3v`.

    Raises:
        CheckpointError: a file is absent or damaged, or the files do not belong together.
    """
    data = read_json(folder / CONFIG_NAME)
    refuse_quantised(data, folder)
    config = vlm_config(data)
    table, files = name_table(data, config), weight_files(folder)
    tensors = merged(read_tensors(files), adapters, table.canonical)
    return Opened(
        data=data,
        config=config,
        processor=image_processor(data, _processor_settings(adapters, folder)),
        tensors=tensors,
        table=table,
        files=[*files, *(file for adapter in adapters for file in adapter.files)],
    )


def _processor_settings(adapters: Sequence[Adapter], folder: Path) -> Json:
    """Return the preprocessor_config.json of the outermost adapter that brings one, or the base's.

    Raises:
        CheckpointError: there is none.
    """
    places = [*(adapter.folder for adapter in reversed(adapters)), folder]
    path = next((one / PROCESSOR for one in places if (one / PROCESSOR).is_file()), None)
    if path is None:
        raise CheckpointError(
            f"{folder} says nowhere how many tiles a picture becomes; expected {PROCESSOR} beside "
            "the weights, copy it from the model's source."
        )
    return read_json(path)
