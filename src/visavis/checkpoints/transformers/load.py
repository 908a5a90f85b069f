"""A folder in transformers' layout: weights, tokenizer, chat template, processor.

    config.json  model.safetensors (or shards, or pytorch_model.bin)  tokenizer.json
    chat_template.jinja | chat_template.json | tokenizer_config.json
    preprocessor_config.json | processor_config.json                  with vision only

Each is read by the file that knows it; here they are found and checked against one another.
Executes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from visavis.checkpoints.adapters import merged
from visavis.checkpoints.checkpoint import Checkpoint, Written
from visavis.checkpoints.checkpoint_format import (
    CONFIG,
    Companions,
    DetectedFormat,
    FolderFormat,
    adapter_files,
    outermost,
    refuse_quantised,
)
from visavis.checkpoints.tensor_files import (
    MAX_JSON_BYTES,
    TensorFiles,
    read_json,
    read_tensors,
    weight_files,
)
from visavis.checkpoints.transformers.config_reader import Json, require, section
from visavis.checkpoints.transformers.export import write_transformers
from visavis.checkpoints.transformers.idefics3 import CLASSES as SPLITTERS
from visavis.checkpoints.transformers.idefics3 import KINDS as IDEFICS3
from visavis.checkpoints.transformers.idefics3 import VIDEO_TEMPLATE, idefics3_processor
from visavis.checkpoints.transformers.internvl import KIND as INTERNVL
from visavis.checkpoints.transformers.internvl import ORIGINAL as INTERNVL_CHAT
from visavis.checkpoints.transformers.internvl import PLACEHOLDER, internvl_processor
from visavis.checkpoints.transformers.language_models import KINDS
from visavis.checkpoints.transformers.llava_onevision15 import KIND as ONEVISION_15
from visavis.checkpoints.transformers.multi_vector import KINDS as MULTI_VECTOR
from visavis.checkpoints.transformers.multi_vector import multi_vector_prompts
from visavis.checkpoints.transformers.pooling import read_pooling
from visavis.checkpoints.transformers.processor import (
    gemma_processor,
    grids,
    naflex_processor,
    processor_config,
)
from visavis.checkpoints.transformers.qwen2_vl import qwen2_vl_processor
from visavis.checkpoints.transformers.vision_models import vlm_config
from visavis.checkpoints.transformers.weights import vlm_table
from visavis.checkpoints.weight_mapping import NameTable
from visavis.errors import CheckpointError
from visavis.model.config import Qwen2VLTowerConfig, ViTConfig, VLMConfig
from visavis.model.embedder_config import GemmaTowerConfig, NaFlexConfig
from visavis.processing.config import ImageProcessorConfig
from visavis.processing.prompt_config import PromptConfig
from visavis.processing.tokenizer import SpecialTokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PROCESSOR = "processor_config.json"
VIDEO_NAME = "video_preprocessor_config.json"


@dataclass(kw_only=True)
class TransformersFormat(FolderFormat):
    """A language model or a LLaVA 1.5 as transformers writes it.

    Attributes:
        jinja: source of the chat template; empty if there is none.
        pooling: of an embedder that sentence-transformers saved; empty: the files do not say.
    """

    kind = "transformers"
    title = "transformers"
    model_types = (*KINDS, "llava")
    target = "transformers"
    usage = (
        "from transformers import {auto}, {reader}\n\n"
        'model = {auto}.from_pretrained("{folder}")\n'
        'reader = {reader}.from_pretrained("{folder}")\n'
    )
    peer = "transformers"
    library = "transformers"
    placeholders: ClassVar[dict[str, tuple[str, ...]]] = {}  # texts of these tokens, if unusual

    jinja: str
    pooling: Literal["", "last", "first", "mean"] = ""

    @classmethod
    def open(cls, detected: DetectedFormat, companions: Companions) -> Self:
        folder, adapters = detected.path, companions.adapters
        data = read_json(folder / CONFIG)
        config, processor = cls.read_config(folder)
        table, files = cls.names(data, config), weight_files(folder)
        weights, headless = read_tensors(files), False
        if config.has_decoder:
            weights, headless = whole_names(weights, data)
        if headless:  # the embeddings stand in for the output layer that it lacks
            config = replace(config, decoder=replace(config.decoder, tied_head=True))
            table = cls.names(data, config)
        opened = cls(
            detected=detected,
            companions=companions,
            name=outermost(folder, adapters).resolve().name,
            settings=data,
            config=config,
            processor=processor,
            table=table,
            weights=merged(weights, adapters, table.canonical),
            files=[folder / CONFIG, *files, *adapter_files(adapters)],
            identity={},
            jinja="",
        )
        opened.jinja = chat_template(opened.tokenizer_folder)
        if config.tower is None or not (config.has_decoder or config.is_dual):
            opened.pooling = read_pooling(folder, opened.jinja)
        opened.jinja = "" if headless else opened.jinja
        opened.identity = data | {
            "processor": processor.to_dict() if processor else None,
            "chat": opened.jinja,
            "pooling": opened.pooling,
        }
        opened.facts = {
            "architecture": str(data["model_type"]),
            "chat template": "in the folder" if opened.jinja else "none",
        }
        return opened

    @classmethod
    def names(cls, data: Json, config: VLMConfig) -> NameTable:
        """Return the names of its tensors."""
        return vlm_table(data, config)

    @classmethod
    def read_config(cls, path: Path) -> tuple[VLMConfig, ImageProcessorConfig | None]:
        data = read_json(path / CONFIG)
        refuse_quantised(data, path)
        config = vlm_config(data)
        processor = image_processor(config, path, data.get("model_type"))
        _check_tiles(data, config, processor, path)
        return config, processor

    @classmethod
    def save(
        cls, checkpoint: Checkpoint, folder: Path, *, kind: str = "", progress: bool = False
    ) -> Written:
        return write_transformers(checkpoint, folder, progress=progress)

    def prompt_config(self, tokenizer: Tokenizer, specials: SpecialTokens) -> PromptConfig:
        return PromptConfig(jinja=self.jinja, pooling=self.pooling or "last")

    def special_tokens(
        self, tokenizer: Tokenizer, specials: SpecialTokens, folder: Path
    ) -> SpecialTokens:
        """Return the special tokens, the placeholders of images and videos among them."""
        assert self.config is not None
        by_text = dict(specials.by_text)
        named = {"image": self.config.image_token_id, "video": self.config.video_token_id}
        for visual, number in named.items():
            if number < 0:
                continue
            text = tokenizer.id_to_token(number)
            usual = self.placeholders.get(visual, (f"<{visual}>", f"<|{visual}_pad|>"))
            others = {one: id for one in usual if (id := tokenizer.token_to_id(one)) is not None}
            if text is None or (others and text not in usual):
                found = "has no such token" if text is None else f"has {text!r} there"
                hint = "".join(f", and {one!r} is its token {id}" for one, id in others.items())
                raise CheckpointError(
                    f"config.json of {folder} names {number} as {visual}_token_index, but the "
                    f"tokenizer {found}{hint}. Tokenizer and config belong to different models, or "
                    "the tokens were added in another order: set the id in config.json that the "
                    "model was trained with."
                )
            by_text[text] = number
        return replace(specials, by_text=by_text)


class LlavaNextFormat(TransformersFormat):
    """LLaVA-NeXT as transformers writes it."""

    kind, title, model_types = "llava_next", "LLaVA-NeXT, transformers", ("llava_next",)
    target = ""


class LlavaOnevisionFormat(TransformersFormat):
    """LLaVA-OneVision as transformers writes it."""

    kind, title = "llava_onevision", "LLaVA-OneVision, transformers"
    model_types, target = ("llava_onevision",), ""


class LlavaOnevision15Format(TransformersFormat):
    """LLaVA-OneVision-1.5 as published, without its code."""

    kind, title = ONEVISION_15, "LLaVA-OneVision-1.5"
    model_types, target = (ONEVISION_15,), ""


class Qwen2VLFormat(TransformersFormat):
    """Qwen2-VL as transformers writes it."""

    kind, title, model_types = "qwen2_vl", "Qwen2-VL, transformers", ("qwen2_vl",)
    target = ""


class Qwen25VLFormat(TransformersFormat):
    """Qwen2.5-VL as transformers writes it."""

    kind, title, model_types = "qwen2_5_vl", "Qwen2.5-VL, transformers", ("qwen2_5_vl",)
    target = ""


class Qwen3VLFormat(TransformersFormat):
    """Qwen3-VL as transformers writes it."""

    kind, title, model_types = "qwen3_vl", "Qwen3-VL, transformers", ("qwen3_vl",)
    target = ""

    def prompt_config(self, tokenizer: Tokenizer, specials: SpecialTokens) -> PromptConfig:
        return PromptConfig(jinja=self.jinja, image_text="qwen3-vl")


class MultiVectorFormat(TransformersFormat):
    """A multi-vector model, such as ColQwen2, as transformers writes it."""

    kind, title = "multi_vector", "multi-vector model, transformers"
    model_types, target = tuple(MULTI_VECTOR), ""

    def prompt_config(self, tokenizer: Tokenizer, specials: SpecialTokens) -> PromptConfig:
        path = self.path / PROCESSOR
        bos, pad = (
            "" if number is None else tokenizer.id_to_token(number) or ""
            for number in (specials.bos_id, specials.pad_id)
        )
        processor = read_json(path) if path.is_file() else {}
        return multi_vector_prompts(self.settings, processor, bos=bos, pad=pad)

    def special_tokens(
        self, tokenizer: Tokenizer, specials: SpecialTokens, folder: Path
    ) -> SpecialTokens:
        found = super().special_tokens(tokenizer, specials, folder)
        if not MULTI_VECTOR[self.settings["model_type"]].writes_bos:
            return found
        return replace(found, add_bos=False, appended=())


class Idefics3Format(TransformersFormat):
    """Idefics3, SmolVLM and SmolVLM2 as transformers writes them."""

    kind, title, model_types = "idefics3", "Idefics3 or SmolVLM, transformers", IDEFICS3
    target = ""

    def prompt_config(self, tokenizer: Tokenizer, specials: SpecialTokens) -> PromptConfig:
        filmed = self.processor is not None and self.processor.video is not None
        video_jinja = VIDEO_TEMPLATE if self.jinja and filmed else ""
        return PromptConfig(jinja=self.jinja, image_text="idefics3", video_jinja=video_jinja)


class InternVLFormat(TransformersFormat):
    """InternVL3 and InternVL3.5 as transformers writes them; the original layout is refused."""

    kind, title = "internvl", "InternVL, transformers"
    model_types, target = (INTERNVL, INTERNVL_CHAT), ""
    placeholders: ClassVar[dict[str, tuple[str, ...]]] = {"image": (PLACEHOLDER,)}

    def prompt_config(self, tokenizer: Tokenizer, specials: SpecialTokens) -> PromptConfig:
        return PromptConfig(jinja=self.jinja, image_text="internvl")


def whole_names(tensors: TensorFiles, data: Json) -> tuple[TensorFiles, bool]:
    """Return tensors by the names of the class with an output layer, and whether they have none.

    What is saved by its base class, as sentence-transformers does (`Qwen2Model`), lacks the output
    layer, and its names lack the `model.` in front.
    """
    classes = data.get("architectures")
    named = str(classes[0]) if isinstance(classes, list) and classes else ""
    entries = tensors.entries
    if not named.endswith("Model") or any(name.endswith("lm_head.weight") for name in entries):
        return tensors, False
    if not any(name.startswith("model.") for name in entries):
        entries = {f"model.{name}": entry for name, entry in entries.items()}
    return TensorFiles(entries), True


def image_processor(
    config: VLMConfig, folder: Path, model_type: object = None
) -> ImageProcessorConfig | None:
    """Return how images are sized and normalised, if the model takes any.

    Raises:
        CheckpointError: no file says it, or one does that belongs to another tower.
    """
    if config.tower is None:
        return None
    names = ("preprocessor_config.json", PROCESSOR)
    found = [read_json(folder / name) for name in names if (folder / name).is_file()]
    settings = [inner for data in found if (inner := _image_settings(data)) is not None]
    if not settings:
        raise CheckpointError(
            f"{folder} says nowhere how pictures are resized and normalised; expected "
            f"{' or '.join(names)} beside the weights, copy it from the model's source."
        )
    videos = [inner for data in found if (inner := section(data, "video_processor"))]
    if (folder / VIDEO_NAME).is_file():
        videos.insert(0, read_json(folder / VIDEO_NAME))
    video = videos[0] if videos else None
    if isinstance(config.tower, Qwen2VLTowerConfig):
        return qwen2_vl_processor(settings[0], video, config.tower)
    if isinstance(config.tower, GemmaTowerConfig):
        return gemma_processor(settings[0], config.tower)
    if isinstance(config.tower, NaFlexConfig):
        return naflex_processor(settings[0], config.tower)
    if model_type == INTERNVL:
        processor = internvl_processor(settings[0], video)
    elif model_type in (*IDEFICS3, "colmodernvbert"):
        kind = str(settings[0].get("image_processor_type"))
        known = kind.removesuffix("Fast").removesuffix("Pil") in SPLITTERS
        require("image_processor_type", kind, known, " or ".join(SPLITTERS))
        processor = idefics3_processor(settings[0], video, takes_videos=model_type == "smolvlm")
    else:
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
    """Refuse images tiled in another way than the model puts them together.

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
