"""GGUF files loaded as a model: weights, tokenizer and chat template, and the vision half if given.

    model.gguf                     a language model, whole or split
    model.gguf + mmproj.gguf       with `vision_tower`, or a folder that holds just these two

Which file is which, its metadata says, never its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visavis.checkpoints.gguf.decoder import check_types, decoder_config, decoder_tensors
from visavis.checkpoints.gguf.groups import take_blocks
from visavis.checkpoints.gguf.mmproj import ARCHITECTURE, Half, half_state, read_half
from visavis.checkpoints.gguf.reader import GGUFFile, open_gguf
from visavis.checkpoints.gguf.split import open_model
from visavis.checkpoints.loaded import Loaded, fingerprint
from visavis.checkpoints.packing import Packing
from visavis.errors import CheckpointError
from visavis.model.config import VLMConfig
from visavis.processing.profile import PromptProfile
from visavis.processing.tokenizer import build_tokenizer, special_tokens

PROFILE = "visavis.prompt_profile"  # ours: how to ask and to embed, word for word
POOLING = {"mean": 1, "last": 3}  # llama.cpp's numbers
PLACEHOLDER = "<image>"  # what vocabularies call it that have one
MAX_LISTED = 5


def load_gguf(
    path: Path,
    *,
    vision_tower: Path | None = None,
    precision: str = "auto",
    device: str = "cpu",
) -> Loaded:
    """Load a language model from a GGUF file (and the other parts of a split one), with its
    tokenizer and chat template, and its vision half.

    Args:
        path: a file, or a folder with one language model and at most one vision half.
        vision_tower: the file of the vision half (mmproj).

    Raises:
        CheckpointError: a file is damaged or of a variant that is not read, or files do not belong
            together.
    """
    if path.is_dir():
        path, found = find_parts(path)
        vision_tower = vision_tower or found
    file, paths = open_model(path)
    if str(file.metadata.get("general.architecture")) == ARCHITECTURE:
        raise CheckpointError(
            f"{path} is the vision half of a model (mmproj), expected its language model; give "
            f"that, and this file with it: visavis.load('model.gguf', vision_tower={str(path)!r})."
        )
    config = VLMConfig(decoder=decoder_config(file))
    half = vision = None
    if vision_tower is not None:
        vision, half = _open_half(vision_tower, config.decoder.width, path)
        paths = [*paths, vision_tower]
    specials = special_tokens(file.metadata)
    if half is not None:
        # Without a placeholder in the vocabulary any id will do: images are found by position.
        config = half.joined(config, specials.by_text.get(PLACEHOLDER, 0))
    check_types(file)
    tokenizer = build_tokenizer(file.metadata)
    packing = Packing(config, precision, device, where=str(path))
    state = {n: take_blocks(packing, file, n, stored) for n, stored in decoder_tensors(file)}
    if vision is not None and half is not None:
        for name, tensor in half_state(vision, half):
            state[name] = packing.take(name, tensor)
    return Loaded(
        name=str(file.metadata.get("general.name", path.stem)),
        vlm=packing.build(state),
        tokenizer=tokenizer,
        specials=specials,
        profile=_profile(file),
        processor=None if half is None else half.processor,
        fingerprint=fingerprint(paths, {"precision": packing.regime}),
        files=paths,
    )


def find_parts(folder: Path) -> tuple[Path, Path | None]:
    """Return the language model of a folder, and its vision half if there is one.

    Raises:
        CheckpointError: several that could be meant, or no language model.
    """
    models, halves = [], []
    for path in sorted(folder.glob("*.gguf")):
        metadata = open_gguf(path).metadata
        if str(metadata.get("general.architecture")) == ARCHITECTURE:
            halves.append(path)
        elif metadata.get("split.no", 0) == 0:
            models.append(path)
    if len(models) != 1 or len(halves) > 1:
        listed = ", ".join(path.name for path in (*models, *halves)[:MAX_LISTED]) or "none"
        raise CheckpointError(
            f"{folder} holds {len(models)} language models and {len(halves)} vision halves in GGUF "
            f"({listed}), expected one and at most one; name the files: "
            "visavis.load('model.gguf', vision_tower='mmproj.gguf')."
        )
    return models[0], halves[0] if halves else None


def _open_half(path: Path, width: int, model: Path) -> tuple[GGUFFile, Half]:
    file = open_gguf(path)
    architecture = str(file.metadata.get("general.architecture"))
    if architecture != ARCHITECTURE:
        raise CheckpointError(
            f"{path} has general.architecture {architecture!r}, expected {ARCHITECTURE!r}, the "
            "vision half of a model (mmproj); give the language model first and this file's "
            "partner as vision_tower."
        )
    half = read_half(file)
    if half.connector.out_width != width:
        raise CheckpointError(
            f"{path} gives image tokens of width {half.connector.out_width}, but {model} is "
            f"{width} wide; the two belong to different models."
        )
    return file, half


def _profile(file: GGUFFile) -> PromptProfile:
    """Return how to ask and to embed: as we wrote it, or what the file's own keys say."""
    metadata: Mapping[str, Any] = file.metadata
    own = metadata.get(PROFILE)
    if isinstance(own, str):
        try:
            return PromptProfile(**json.loads(own))
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{file.path}: {PROFILE} cannot be read ({error}); the file is damaged or from a "
                "newer visavis: upgrade it."
            ) from error
    number = metadata.get(f"{metadata['general.architecture']}.pooling_type")
    number = number if isinstance(number, int) else None
    jinja = str(metadata.get("tokenizer.chat_template", ""))
    return PromptProfile(jinja=jinja, pooling="mean" if number == POOLING["mean"] else "last")
