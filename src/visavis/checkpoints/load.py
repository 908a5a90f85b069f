"""From a name or path to a loaded model; which layout it is, files decide, never folder names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from visavis.checkpoints import bundled, hub
from visavis.checkpoints.known_models import known_models
from visavis.errors import CheckpointError, FetchError, InputError, UnknownNameError
from visavis.processing.chat_formats import CHAT_FORMATS
from visavis.processing.config import sized_as
from visavis.processing.prompt_config import PROFILES, stated_profile
from visavis.utils import lookup, suggest

if TYPE_CHECKING:
    from visavis.checkpoints.checkpoint import Checkpoint
    from visavis.checkpoints.checkpoint_format import CheckpointFormat, Companions

NANO_FOLDER = Path(__file__).parent / "nano"
NAMES = {
    "nano": "SmolLM2-135M + EfficientNet-Lite2 + all-MiniLM-L6-v2: chats and embeds, offline",
    "smollm2-135m": "SmolLM2-135M-Instruct alone (the GGUF file nano is built on), text only",
    "tiny-random": "a whole model of random numbers that trains in seconds, to try recipes with",
}


def resolve(name_or_path: str | Path) -> Path:
    """Return the folder or file that a name or path stands for, fetching what is not here.

    Raises:
        UnknownNameError: it is neither a known name, an existing path nor a name on the hub.
        FetchError: weights cannot be had.
    """
    name = str(name_or_path)
    if name == "smollm2-135m":
        return bundled.fetch("nano")["language_model"]
    wanted = _on_hub(name)
    if wanted is None:
        return _here(name)
    with _named(name, wanted):
        return hub.fetch(wanted)


@contextmanager
def _named(name: str, wanted: hub.HubId) -> Iterator[None]:
    """Say in errors what a short name stands for."""
    try:
        yield
    except FetchError as error:
        if name == str(wanted):
            raise
        raise FetchError(f"{name} stands for {wanted} on the Hugging Face Hub: {error}") from error


def find_settings(name_or_path: str | Path) -> Path:
    """Return the folder or file that holds a model's settings. Of a name on the hub only settings
    are downloaded, and no weights.

    Raises:
        UnknownNameError: see `resolve`.
        FetchError: the settings are not on this machine and cannot be downloaded.
    """
    name = str(name_or_path)
    if name == "smollm2-135m":
        file = bundled.cache_dir() / "nano" / bundled.NANO_WHEELS["language_model"].file_name
        if not file.is_file():
            raise FetchError(f"{name} is not on this machine: run `visavis fetch nano` first.")
        return file
    wanted = _on_hub(name)
    if wanted is None:
        return _here(name)
    if wanted.file:
        raise FetchError(f"{wanted} is a whole file: fetch it, and give its path.")
    with _named(name, wanted):
        return hub.fetch(wanted, settings_only=True)


def _on_hub(name: str) -> hub.HubId | None:
    """Return the hub id that a name stands for; a path that exists wins."""
    if os.path.exists(os.path.expanduser(name)):
        return None
    known = known_models().get(name)
    return hub.parse(known.hub if known and known.hub else name)


def _here(name: str) -> Path:
    if name == "nano":
        return NANO_FOLDER
    if name == "tiny-random":
        from visavis.checkpoints import tiny_random

        return tiny_random.fetch()
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):
        return path
    near = suggest(name, {**NAMES, **known_models()})
    raise UnknownNameError(
        f"no model is named {name!r} and no such file or folder exists: {near} Otherwise give "
        "another name of `visavis models` or of the hub (owner/name), the path of a .gguf file, "
        "or that of a folder that visavis, transformers or LLaVA wrote."
    )


def load_checkpoint(
    name_or_path: str | Path,
    *,
    precision: str = "auto",
    device: str = "auto",
    chat_template: str = "",
    profile: str = "",
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
) -> Checkpoint:
    """Load a bundled name, a name on the hub, a .gguf file or a folder in any layout that is read.

    Raises:
        UnknownNameError, FetchError: see `resolve`; or `chat_template` or `profile` is not
            known.
        CheckpointError: the files are damaged or of a kind not known.
    """
    if chat_template:
        lookup("chat template", chat_template, CHAT_FORMATS)
    known = known_models().get(str(name_or_path))
    if not profile and known and _on_hub(known.name):
        profile = known.profile
    if profile:
        lookup("profile", profile, PROFILES)
    from visavis.checkpoints.checkpoint import INTEGERS, checkpoint_fingerprint
    from visavis.checkpoints.checkpoint_format import Companions

    path = resolve(name_or_path)
    companions = Companions(
        base=None if base is None else resolve(base),
        vision_tower=None if vision_tower is None else resolve(vision_tower),
        fetch=True,
    )
    opened = _opened(path, companions)
    loaded = _load(opened, precision, pick_device(device))
    if precision in INTEGERS:
        loaded.fingerprint = checkpoint_fingerprint(
            [], {"model": loaded.fingerprint, "bits": precision}
        )
    if chat_template:
        loaded.profile = replace(loaded.profile, chat_template=chat_template)
    if profile := profile or stated_profile(opened.settings):
        embed_as(loaded, profile)
    return loaded


def embed_as(loaded: Checkpoint, profile: str) -> None:
    """Let a model embed, and size its images, as a profile says, and chat as before."""
    from visavis.checkpoints.checkpoint import checkpoint_fingerprint

    loaded.profile = loaded.profile.embedding_as(PROFILES[profile])
    if loaded.processor is not None:
        loaded.processor = sized_as(loaded.processor, profile)
    loaded.fingerprint = checkpoint_fingerprint(
        [], {"model": loaded.fingerprint, "profile": profile}
    )


def _opened(path: Path, companions: Companions) -> CheckpointFormat:
    """Open a checkpoint, an adapter together with its base."""
    from visavis.checkpoints.adapters import adapter_chain
    from visavis.checkpoints.checkpoint_format import CONFIG
    from visavis.checkpoints.formats import AdapterFormat, detect, detect_config
    from visavis.checkpoints.llava.config import is_llava
    from visavis.checkpoints.tensor_files import read_json

    found = detect(path)
    takes = {*found.format.takes}
    if found.format is AdapterFormat:
        adapters, base = adapter_chain(path, companions.base)
        if not (base / CONFIG).is_file():
            raise CheckpointError(
                f"{path} is an adapter on {base}, which has no {CONFIG}; expected a folder in "
                "transformers' or LLaVA's original layout as its base."
            )
        # LLaVA's adapters bring its config: their base may be the language model alone.
        whole = (path / CONFIG).is_file() and is_llava(read_json(path / CONFIG))
        found = detect_config(path if whole else base)
        companions = replace(companions, adapters=tuple(adapters), base=base if whole else None)
        takes = {*found.format.takes, "base"}
    given = [name for name in ("base", "adapters", "vision_tower") if getattr(companions, name)]
    if unused := [name for name in given if name not in takes]:
        raise InputError(
            f"{unused[0]} was given for {path}, which has no use for it: it is whole "
            f"({found.title}: {found.why}); leave it."
        )
    return found.open(companions)


def _load(opened: CheckpointFormat, precision: str, device: str) -> Checkpoint:
    """Read an opened checkpoint's tokenizer and tensors."""
    from visavis.checkpoints.checkpoint import Checkpoint
    from visavis.checkpoints.quantize import Quantizer

    if opened.lacking or opened.config is None:
        raise CheckpointError(opened.lacking)
    tokenizer, specials = opened.tokenizer()
    quantizer = Quantizer(opened.config, precision, device, where=str(opened.path))
    state, low_rank = opened.state(quantizer)
    return Checkpoint(
        name=opened.name,
        vlm=quantizer.build(state, low_rank),
        tokenizer=tokenizer,
        specials=specials,
        profile=opened.prompt_config(tokenizer, specials),
        processor=opened.processor,
        fingerprint=opened.fingerprint(quantizer),
        files=opened.files,
        text_tokenizer=opened.text_tokenizer(),
    )


def pick_device(device: str) -> str:
    """Return "cuda" or "cpu" for "auto", else the device as asked for."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
