"""A folder in LLaVA's original layout, loaded whole; its vision tower or base may lie elsewhere.

    config.json  weights  tokenizer.json                       a checkpoint
    config.json  mm_projector.bin                              a first stage: its base must be given
    vision_tower/  or a folder that the caller or config.json names

The tower's weights come from the checkpoint if it holds any (they may have been trained there),
else from the tower's folder, which may be fetched from the hub. Executes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from visavis.checkpoints import hub
from visavis.checkpoints.adapters import Adapter, merged
from visavis.checkpoints.checkpoint import Checkpoint, checkpoint_fingerprint
from visavis.checkpoints.detect import PROJECTOR, is_first_stage
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
from visavis.checkpoints.quantize import Quantizer
from visavis.checkpoints.tensor_files import (
    StoredTensor,
    TensorFiles,
    read_headers,
    read_json,
    weight_files,
)
from visavis.checkpoints.transformers.config_reader import Json, require
from visavis.checkpoints.transformers.load import (
    CONFIG_NAME,
    chat_template,
    check_vocabulary,
    refuse_quantised,
    words_folder,
)
from visavis.checkpoints.transformers.processor import processor_config
from visavis.checkpoints.transformers.vision_models import vision_part
from visavis.checkpoints.transformers.weights import read_as, tower_table
from visavis.checkpoints.weight_mapping import NameTable
from visavis.errors import CheckpointError, FetchError
from visavis.model.config import VLMConfig
from visavis.processing.images import ImageProcessorConfig
from visavis.processing.prompt_encoder import PROFILES, PromptConfig
from visavis.processing.tokenizer import (
    SpecialTokens,
    has_tokenizer,
    load_tokenizer,
    tokenizer_file,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PROCESSOR = "preprocessor_config.json"
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MAX_LISTED = 4


def load_llava(
    folder: Path,
    *,
    base: Path | None = None,
    adapters: Sequence[Adapter] = (),
    vision_tower: Path | None = None,
    precision: str = "auto",
    device: str = "cpu",
) -> Checkpoint:
    """Load a checkpoint, a first stage's projector on its base, or adapters on theirs.

    Args:
        folder: what holds the layout's config.json.
        base: the language model's folder, of a first stage or of adapters.
        vision_tower: the folder of the tower; for its weights too if the checkpoint has none.

    Raises:
        CheckpointError: a file is absent or damaged, or the files do not belong together.
    """
    found = open_llava(folder, base=base, adapters=adapters, vision_tower=vision_tower, fetch=True)
    if found.lacking is not None:
        raise found.lacking
    data, config, processor = found.data, found.config, found.processor
    body = base or folder
    words = folder if has_tokenizer(folder) else words_folder(adapters, body)
    tokenizer, specials = load_tokenizer(words)
    specials = _with_image_tokens(tokenizer, specials, found, words)
    check_vocabulary(tokenizer, config, words)
    packing = Quantizer(config, precision, device, where=str(folder))
    state = read_as(config, found.table, found.tensors, where=str(folder), convert=packing.take)
    identity: dict[str, Any] = {"config": data, "text": found.text, "vision": found.vision}
    identity |= {"processor": processor.to_dict(), "adapters": [one.config for one in adapters]}
    top = adapters[-1].folder if adapters else folder
    return Checkpoint(
        name=top.resolve().name,
        vlm=packing.build(state),
        tokenizer=tokenizer,
        specials=specials,
        profile=_profile(found, folder),
        processor=processor,
        fingerprint=checkpoint_fingerprint([tokenizer_file(words), *found.files], identity),
        files=[folder / CONFIG_NAME, *found.files],
    )


@dataclass(frozen=True)
class Opened:
    """A folder with all its parts found and no tensor read.

    Attributes:
        tensors: by the layout's names, wherever they lie.
        added: special tokens that a first stage adds to its base's vocabulary.
        chat_template: the chat format that the config settles; empty for a first stage, which has
            seen captions only.
        lacking: why the folder cannot be loaded as it is.
    """

    data: Json
    text: Json
    vision: Json
    config: VLMConfig
    processor: ImageProcessorConfig
    tensors: TensorFiles
    table: NameTable
    files: list[Path]
    first_stage: bool
    added: tuple[str, ...]
    chat_template: str
    lacking: CheckpointError | None


def open_llava(
    folder: Path,
    *,
    base: Path | None = None,
    adapters: Sequence[Adapter] = (),
    vision_tower: Path | None = None,
    fetch: bool = False,
) -> Opened:
    """Find the parts of a model; see `load_llava`.

    Args:
        fetch: a vision tower that is needed and not here may be fetched from the hub.

    Raises:
        CheckpointError: a file is absent or damaged, or the files do not belong together.
    """
    data = read_json(folder / CONFIG_NAME)
    refuse_quantised(data, folder)
    first_stage = is_first_stage(folder)
    body = _base(folder, base) if first_stage else base or folder
    text = read_json(body / CONFIG_NAME)
    refuse_quantised(text, body)
    if is_llava(text):
        text = text_config(text)
    files = weight_files(body)
    entries = read_headers(files)
    added: tuple[str, ...] = ()
    if first_stage:
        files.append(folder / PROJECTOR)
        start, end = image_tokens(data)
        if start:
            added = (*(("<im_patch>",) if data.get("mm_use_im_patch_token") else ()), start, end)
        entries |= _first_stage(folder / PROJECTOR, entries, len(added))
    if added:
        text = {**text, "vocab_size": entries[EMBEDDINGS].shape[0]}
    files += [file for adapter in adapters for file in adapter.files]
    # The names of this layout have one spelling.
    entries = dict(merged(TensorFiles(entries), adapters, str).entries)
    tower = _tower_folder(folder, data, vision_tower)
    has_tower = any(name.startswith(TOWER_PREFIX) for name in entries)
    if fetch and tower is None and (not has_tower or known_tower(data) is None):
        tower = _fetched_tower(folder, data)
    vision = _vision_config(folder, data, tower)
    lacking = None
    if not has_tower and tower is None:
        lacking = _no_tower(folder, data, "its weights")
    elif not has_tower and tower is not None:
        tower_files = weight_files(tower)
        files += tower_files
        half = tower_table(vision)
        for name, entry in read_headers(tower_files).items():
            if not half.is_ignored(half.canonical(name)):
                entries[TOWER_PREFIX + name] = entry
    config = vlm_config(data, text, vision)
    processor = _processor(folder, data, tower)
    if processor.size != vision["image_size"]:
        raise CheckpointError(
            f"pictures for {folder} are prepared with {processor.size} pixels, but its vision "
            f"tower takes {vision['image_size']}; {PROCESSOR} belongs to another tower."
        )
    return Opened(
        data=data,
        text=text,
        vision=vision,
        config=config,
        processor=processor,
        tensors=TensorFiles(entries),
        table=name_table(text, vision, config),
        files=files,
        first_stage=first_stage,
        added=added,
        chat_template="" if first_stage else turns_of(data, text),
        lacking=lacking,
    )


def _base(folder: Path, base: Path | None) -> Path:
    if base is None:
        named = read_json(folder / CONFIG_NAME).get("_name_or_path")
        raise CheckpointError(
            f"{folder} holds a projector alone ({PROJECTOR}, LLaVA's first stage), expected its "
            f"language model too{f' ({named})' if named else ''}; give that model's folder: "
            "visavis.load(…, base='…')."
        )
    return base


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


def _with_image_tokens(
    tokenizer: Tokenizer, specials: SpecialTokens, found: Opened, words: Path
) -> SpecialTokens:
    """Return the special tokens, those around each image among them."""
    tokens = image_tokens(found.data)
    if not tokens[0]:
        return specials
    tokenizer.add_special_tokens(list(found.added))
    texts = (*found.added, *tokens)
    ids = {text: number for text in texts if (number := tokenizer.token_to_id(text)) is not None}
    rows = found.config.decoder.vocab_size
    if len(ids) < len(set(texts)) or (found.added and ids[tokens[1]] != rows - 1):
        raise CheckpointError(
            f"the tokenizer of {words} gives {', '.join(tokens)} the ids "
            f"{[ids.get(text) for text in tokens]}, but the model has {rows} embeddings and was "
            "trained with these tokens around each image (mm_use_im_start_end); copy the "
            "tokenizer that was saved with it."
        )
    return replace(specials, by_text=specials.by_text | ids)


def _profile(found: Opened, folder: Path) -> PromptConfig:
    """Return how the checkpoint is asked and how it embeds."""
    start, end = image_tokens(found.data)
    jinja = "" if found.first_stage or found.chat_template else chat_template(folder)
    profile = PromptConfig(
        chat_template=found.chat_template,
        jinja=jinja,
        image_start=start,
        image_end=end,
        video_times="llava-video" if tells_times(found.data) else "",
    )
    return profile.embedding_as(PROFILES["llave"]) if is_llave(found.data) else profile


def _tower_folder(folder: Path, data: Json, given: Path | None) -> Path | None:
    """Return the vision tower's folder, if there is one on this machine."""
    if given is not None:
        if not (given / CONFIG_NAME).is_file():
            raise CheckpointError(
                f"the vision tower's folder {given} has no {CONFIG_NAME}; expected a CLIP or "
                "SigLIP in transformers' layout."
            )
        return given
    places = [folder / "vision_tower", folder / str(data["mm_vision_tower"])]
    return next((place for place in places if (place / CONFIG_NAME).is_file()), None)


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
        return vision_part(read_json(tower / CONFIG_NAME))
    if (known := known_tower(data)) is not None:
        return known[0]
    raise _no_tower(folder, data, "its settings")


def _processor(folder: Path, data: Json, tower: Path | None) -> ImageProcessorConfig:
    """Return how pictures are sized and normalised."""
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
