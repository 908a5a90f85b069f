"""A folder in LLaVA's original layout; its vision tower or base may lie elsewhere.

    config.json  weights  tokenizer.json                       a checkpoint
    config.json  mm_projector.bin                              a first stage: its base must be given
    vision_tower/  or a folder that the caller or config.json names

The tower's weights come from the checkpoint if it holds any (they may have been trained there),
else from the tower's folder, which may be fetched from the hub. Executes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from visavis.checkpoints import hub
from visavis.checkpoints.adapters import merged
from visavis.checkpoints.checkpoint import Checkpoint, Written
from visavis.checkpoints.checkpoint_format import (
    CONFIG,
    NO_TEMPLATE,
    Candidate,
    Companions,
    DetectedFormat,
    FolderFormat,
    adapter_files,
    outermost,
    refuse_quantised,
)
from visavis.checkpoints.llava.config import (
    TOWER_PREFIX,
    image_tokens,
    is_llava,
    is_llave,
    known_tower,
    name_table,
    tells_times,
    text_config,
    tiles_config,
    turns_of,
    vlm_config,
)
from visavis.checkpoints.llava.export import write_llava
from visavis.checkpoints.tensor_files import (
    StoredTensor,
    TensorFiles,
    read_headers,
    read_json,
    weight_files,
)
from visavis.checkpoints.transformers.config_reader import Json, require
from visavis.checkpoints.transformers.load import chat_template
from visavis.checkpoints.transformers.processor import processor_config
from visavis.checkpoints.transformers.vision_models import vision_part
from visavis.checkpoints.transformers.weights import tower_table
from visavis.errors import CheckpointError, FetchError
from visavis.model.config import VLMConfig
from visavis.processing.config import ImageProcessorConfig
from visavis.processing.prompt_config import PROFILES, PromptConfig
from visavis.processing.tokenizer import SpecialTokens, has_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PROCESSOR = "preprocessor_config.json"
PROJECTOR = "mm_projector.bin"  # what LLaVA's first stage trains
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MAX_LISTED = 4


@dataclass(kw_only=True)
class LlavaFormat(FolderFormat):
    """A checkpoint in LLaVA's original format, or LLaVA's adapters on their base.

    Attributes:
        chat_template: the chat format that config.json settles; empty: `jinja` is used.
        added: special tokens that are added to the tokenizer's vocabulary.
    """

    kind = "llava_original"
    title = "LLaVA, original"
    takes = ("adapters", "vision_tower")
    target = "llava"

    chat_template: str = ""
    jinja: str = ""
    added: tuple[str, ...] = ()

    @classmethod
    def matches(cls, candidate: Candidate) -> DetectedFormat | None:
        if not is_llava(candidate.config):
            return None
        return cls.found(candidate, f"{CONFIG} has mm_vision_tower", CONFIG)

    @classmethod
    def open(cls, detected: DetectedFormat, companions: Companions) -> Self:
        folder, body = detected.path, companions.base or detected.path
        data, text = _read_configs(folder, body)
        files, settled = weight_files(body), turns_of(data, text)
        jinja = "" if settled else chat_template(folder)
        return cls(
            **_assembled(detected, companions, data, text, files, read_headers(files)),
            facts=_facts(data, text, settled or ("in the folder" if jinja else "")),
            chat_template=settled,
            jinja=jinja,
        )

    @classmethod
    def read_config(cls, path: Path) -> tuple[VLMConfig, ImageProcessorConfig | None]:
        data, text = _read_configs(path, path)
        tower = _tower_folder(path, data, None)
        vision = _vision_config(path, data, tower)
        return vlm_config(data, text, vision), _image_processor(path, data, vision, tower)

    @classmethod
    def save(
        cls, checkpoint: Checkpoint, folder: Path, *, kind: str = "", progress: bool = False
    ) -> Written:
        return write_llava(checkpoint, folder, progress=progress)

    @property
    def tokenizer_folder(self) -> Path:
        """The checkpoint's own folder if it has a tokenizer, else an adapter's or the base's."""
        if has_tokenizer(self.path):
            return self.path
        places = [adapter.folder for adapter in reversed(self.companions.adapters)]
        body = self.companions.base or self.path
        return next((place for place in places if has_tokenizer(place)), body)

    def special_tokens(
        self, tokenizer: Tokenizer, specials: SpecialTokens, folder: Path
    ) -> SpecialTokens:
        """Return the special tokens, those around each image among them."""
        assert self.config is not None
        tokens = image_tokens(self.settings)
        if not tokens[0]:
            return specials
        tokenizer.add_special_tokens(list(self.added))
        texts = (*self.added, *tokens)
        ids = {text: n for text in texts if (n := tokenizer.token_to_id(text)) is not None}
        rows = self.config.decoder.vocab_size
        if len(ids) < len(set(texts)) or (self.added and ids[tokens[1]] != rows - 1):
            raise CheckpointError(
                f"the tokenizer of {folder} gives {', '.join(tokens)} the ids "
                f"{[ids.get(text) for text in tokens]}, but the model has {rows} embeddings and "
                "was trained with these tokens around each image (mm_use_im_start_end); copy the "
                "tokenizer that was saved with it."
            )
        return replace(specials, by_text=specials.by_text | ids)

    def prompt_config(self, tokenizer: Tokenizer, specials: SpecialTokens) -> PromptConfig:
        start, end = image_tokens(self.settings)
        found = PromptConfig(
            chat_template=self.chat_template,
            jinja=self.jinja,
            image_start=start,
            image_end=end,
            video_times="llava-video" if tells_times(self.settings) else "",
        )
        return found.embedding_as(PROFILES["llave"]) if is_llave(self.settings) else found


@dataclass(kw_only=True)
class LlavaFirstStageFormat(LlavaFormat):
    """The projector that LLaVA's first stage trains; its language model is a companion."""

    kind = "llava_first_stage"
    title = "LLaVA, first stage"
    takes = ("base", "vision_tower")
    target = ""

    @classmethod
    def matches(cls, candidate: Candidate) -> DetectedFormat | None:
        folder = candidate.path
        whole = any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*"))
        if not is_llava(candidate.config) or not (folder / PROJECTOR).is_file() or whole:
            return None
        why = f"{CONFIG} has mm_vision_tower, and {PROJECTOR} stands without a model"
        return cls.found(candidate, why, CONFIG, PROJECTOR)

    @classmethod
    def open(cls, detected: DetectedFormat, companions: Companions) -> Self:
        folder, base = detected.path, companions.base
        if base is None:
            return cls._projector(detected, companions)
        data, text = _read_configs(folder, base)
        files = weight_files(base)
        entries = read_headers(files)
        added: tuple[str, ...] = ()
        start, end = image_tokens(data)
        if start:
            added = (*(("<im_patch>",) if data.get("mm_use_im_patch_token") else ()), start, end)
        entries |= _first_stage(folder / PROJECTOR, entries, len(added))
        if added:
            text = {**text, "vocab_size": entries[EMBEDDINGS].shape[0]}
        files.append(folder / PROJECTOR)
        return cls(
            **_assembled(detected, companions, data, text, files, entries),
            facts=_facts(data, text, ""),
            added=added,
        )

    @classmethod
    def _projector(cls, detected: DetectedFormat, companions: Companions) -> Self:
        """Open a projector alone."""
        folder = detected.path
        data = read_json(folder / CONFIG)
        refuse_quantised(data, folder)
        named = data.get("_name_or_path")
        return cls(
            detected=detected,
            companions=companions,
            name=folder.resolve().name,
            settings=data,
            config=None,
            weights=TensorFiles(read_headers([folder / PROJECTOR])),
            files=[folder / CONFIG, folder / PROJECTOR],
            facts={
                "base": str(data.get("_name_or_path", "not named")),
                "vision tower": str(data["mm_vision_tower"]),
            },
            lacking=(
                f"{folder} holds a projector alone ({PROJECTOR}, LLaVA's first stage), expected "
                f"its language model too{f' ({named})' if named else ''}; give that model's "
                "folder: visavis.load(…, base='…')."
            ),
            details=str(data.get("mm_projector_type", "linear")),
            identity={},
        )

    @classmethod
    def read_config(cls, path: Path) -> tuple[VLMConfig, ImageProcessorConfig | None]:
        raise CheckpointError(f"{path} holds a projector alone, expected a whole model.")


def _read_configs(folder: Path, body: Path) -> tuple[Json, Json]:
    """Return config.json of a checkpoint and that of its language model.

    Args:
        body: the folder of the language model.
    """
    data, text = read_json(folder / CONFIG), read_json(body / CONFIG)
    refuse_quantised(text, body)  # an adapter's config repeats how its base was quantised (QLoRA)
    return data, text_config(text) if is_llava(text) else text


def _assembled(
    detected: DetectedFormat,
    companions: Companions,
    data: Json,
    text: Json,
    files: list[Path],
    entries: Mapping[str, StoredTensor],
) -> dict[str, Any]:
    """Return the fields of a language model and a connector with their adapters and vision tower.

    Args:
        data, text: config.json of the checkpoint and of the language model.
        files, entries: all weights but those of adapters and of a tower that lies elsewhere.
    """
    folder, adapters = detected.path, companions.adapters
    # The names of this layout have one spelling.
    entries = dict(merged(TensorFiles(entries), adapters, str).entries)
    files = [folder / CONFIG, *files, *adapter_files(adapters)]
    tower = _tower_folder(folder, data, companions.vision_tower)
    has_tower = any(name.startswith(TOWER_PREFIX) for name in entries)
    if companions.fetch and tower is None and (not has_tower or known_tower(data) is None):
        tower = _fetched_tower(folder, data)
    vision = _vision_config(folder, data, tower)
    lacking = ""
    if not has_tower and tower is None:
        lacking = str(_no_tower(folder, data, "its weights"))
    elif not has_tower and tower is not None:
        tower_files = weight_files(tower)
        files += tower_files
        half = tower_table(vision)
        for name, entry in read_headers(tower_files).items():
            if not half.is_ignored(half.canonical(name)):
                entries[TOWER_PREFIX + name] = entry
    config = vlm_config(data, text, vision)
    processor = _image_processor(folder, data, vision, tower)
    settings = {"config": data, "text": text, "vision": vision, "processor": processor.to_dict()}
    return {
        "detected": detected,
        "companions": companions,
        "name": outermost(folder, adapters).resolve().name,
        "settings": data,
        "config": config,
        "processor": processor,
        "table": name_table(text, vision, config),
        "weights": TensorFiles(entries),
        "files": files,
        "identity": settings,
        "lacking": lacking,
    }


def _facts(data: Json, text: Json, template: str) -> dict[str, str]:
    return {
        "architecture": str(text["model_type"]),
        "vision tower": str(data["mm_vision_tower"]),
        "chat template": template or NO_TEMPLATE,
    }


def _first_stage(
    path: Path, base: dict[str, StoredTensor], num_added: int
) -> dict[str, StoredTensor]:
    """Return how to read a first stage's tensors: its projector, and the base's vocabulary with
    the rows of added tokens. What stands before `mm_projector` varies."""
    part, found = "mm_projector.", read_headers([path])
    rows = next((name for name in found if num_added and name.endswith("embed_tokens.weight")), "")
    trained = found.pop(rows, None)
    strange = [name for name in found if part not in name]
    if strange or not found:
        listed = ", ".join(strange[:MAX_LISTED]) or "nothing"
        raise CheckpointError(
            f"{path} holds {listed}, expected tensors of the projector ({part}…), and rows of "
            "embed_tokens only where config.json sets mm_use_im_start_end; a resampler is not "
            "read here."
        )
    entries = {f"model.{name[name.index(part) :]}": entry for name, entry in found.items()}
    if not num_added:
        return entries
    old = base.get(EMBEDDINGS)
    shapes = ((2, old.shape[1]), (old.shape[0] + num_added, old.shape[1])) if old else ()
    if trained is None or old is None or trained.shape not in shapes:
        raise CheckpointError(
            f"{path} holds embeddings of shape {trained and trained.shape}, expected one of "
            f"{shapes}: config.json adds {num_added} tokens to the base (mm_use_im_start_end). "
            "The file or the base belongs to another model."
        )
    # As LLaVA starts them: means of all rows. Those of <im_start> and <im_end> were trained.
    entries[EMBEDDINGS] = _grown(old, num_added - 2, trained)
    if HEAD in base:
        entries[HEAD] = _grown(base[HEAD], num_added)
    return entries


def _grown(old: StoredTensor, num_means: int, trained: StoredTensor | None = None) -> StoredTensor:
    """Return how to read a matrix with rows added: means of the old ones, then trained ones."""
    num_trained = 0 if trained is None else 2

    def read() -> Tensor:
        rows = old()
        mean = rows.mean(0, keepdim=True, dtype=torch.float32).to(rows.dtype)
        last = [] if trained is None else [trained()[-2:].to(rows.dtype)]
        return torch.cat([rows, mean.expand(num_means, -1), *last])

    return StoredTensor(old.dtype, (old.shape[0] + num_means + num_trained, old.shape[1]), read)


def _tower_folder(folder: Path, data: Json, given: Path | None) -> Path | None:
    """Return the vision tower's folder, if there is one on this machine."""
    if given is not None:
        if not (given / CONFIG).is_file():
            raise CheckpointError(
                f"the vision tower's folder {given} has no {CONFIG}; expected a CLIP or "
                "SigLIP in transformers' layout."
            )
        return given
    places = [folder / "vision_tower", folder / str(data["mm_vision_tower"])]
    return next((place for place in places if os.path.isfile(place / CONFIG)), None)


def _fetched_tower(folder: Path, data: Json) -> Path | None:
    """Return the vision tower from the hub, if its name is one there."""
    wanted = hub.parse(str(data["mm_vision_tower"]))
    try:
        return None if wanted is None else hub.fetch(wanted)
    except FetchError as error:
        message = _no_tower(folder, data, "its weights" if known_tower(data) else "its settings")
        raise CheckpointError(f"{message} ({error})") from error


def _vision_config(folder: Path, data: Json, tower: Path | None) -> Json:
    if tower is not None:
        return vision_part(read_json(tower / CONFIG))
    if (known := known_tower(data)) is not None:
        return known[0]
    raise _no_tower(folder, data, "its settings")


def _image_processor(
    folder: Path, data: Json, vision: Json, tower: Path | None
) -> ImageProcessorConfig:
    """Return how images are sized and normalised.

    Raises:
        CheckpointError: no file says it, or one does that belongs to another tower.
    """
    processor = _processor(folder, data, tower)
    if processor.size != vision["image_size"]:
        raise CheckpointError(
            f"pictures for {folder} are prepared with {processor.size} pixels, but its vision "
            f"tower takes {vision['image_size']}; {PROCESSOR} belongs to another tower."
        )
    return processor


def _processor(folder: Path, data: Json, tower: Path | None) -> ImageProcessorConfig:
    places = [place / PROCESSOR for place in (folder, tower) if place is not None]
    path = next((place for place in places if place.is_file()), None)
    if path is not None:
        processor = processor_config(read_json(path))
    elif (known := known_tower(data)) is not None:
        processor = processor_config(known[1])
    else:
        raise _no_tower(folder, data, f"a {PROCESSOR}")
    tiles = tiles_config(data, processor.size)
    if tiles is None and data.get("image_aspect_ratio") != "pad":
        return processor
    whole = processor.crop_fraction == 1
    require("crop_size", processor.size, whole, "the shortest edge, for padded or tiled pictures")
    if tiles is None:
        return replace(processor, resize="pad")
    require("resample", processor.resample, processor.resample == "bicubic", "'bicubic'")
    return replace(processor, resize="squash", tiles=tiles)


def _no_tower(folder: Path, data: Json, lacking: str) -> CheckpointError:
    return CheckpointError(
        f"{folder} lacks {lacking}: config.json names the vision tower "
        f"{data['mm_vision_tower']!r}, which is not in the checkpoint and is no folder here. Fetch "
        f"it, and put it into {folder / 'vision_tower'} or give it: "
        "visavis.load(…, vision_tower='…')."
    )
