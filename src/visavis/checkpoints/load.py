"""From a name or path to a loaded model; which layout it is, files decide, never folder names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visavis.checkpoints import bundled, hub
from visavis.errors import CheckpointError, InputError, UnknownNameError
from visavis.processing.chat_formats import CHAT_FORMATS
from visavis.processing.prompt_encoder import PROFILES
from visavis.utils import lookup, suggest

if TYPE_CHECKING:
    from visavis.checkpoints.checkpoint import Checkpoint
    from visavis.processing.images import ImageProcessorConfig

NANO_FOLDER = Path(__file__).parent / "nano"
VLM2VEC_FRAMES = 8  # of a video, in its training and its evaluation
NAMES = {
    "nano": "SmolLM2-135M-Instruct + EfficientNet-Lite2: chats and embeds, works offline",
    "smollm2-135m": "SmolLM2-135M-Instruct alone (the GGUF file nano is built on), text only",
    "tiny-random": "a whole model of random numbers that trains in seconds, to try recipes with",
}


@dataclass(frozen=True)
class Loader:
    """What loads a layout: `function(path, *, precision, device, ...)`, given those of `base`,
    `adapters` and `vision_tower` that it takes and that are there."""

    function: str  # module and function below visavis.checkpoints, imported when needed
    takes: tuple[str, ...] = ()


LOADERS = {  # by kinds of `detect.py`
    "native": Loader("native:load_native"),
    "gguf": Loader("gguf.load:load_gguf", ("vision_tower",)),
    "mmproj": Loader("gguf.load:load_gguf", ("vision_tower",)),
    "transformers": Loader("transformers.load:load_transformers", ("adapters",)),
    "llava_next": Loader("transformers.load:load_transformers", ("adapters",)),
    "llava_onevision": Loader("transformers.load:load_transformers", ("adapters",)),
    "phi3_v": Loader("phi3v:load_phi3v", ("adapters",)),
    "qwen2_vl": Loader("transformers.load:load_transformers", ("adapters",)),
    "llava_original": Loader("llava.load:load_llava", ("adapters", "vision_tower")),
    "tinyllava": Loader("tinyllava.load:load_tinyllava", ("adapters",)),
    "llava_first_stage": Loader("llava.load:load_llava", ("base", "vision_tower")),
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
    return hub.fetch(wanted) if wanted else _here(name)


def find(name_or_path: str | Path) -> Path | None:
    """Return what `resolve` does if it is on this machine, else None; asks no network.

    Raises:
        UnknownNameError: see `resolve`.
    """
    name = str(name_or_path)
    if name == "smollm2-135m":
        file = bundled.cache_dir() / "nano" / bundled.NANO_WHEELS["language_model"].file_name
        return file if file.is_file() else None
    wanted = _on_hub(name)
    return hub.cached(wanted) if wanted else _here(name)


def _on_hub(name: str) -> hub.HubId | None:
    return None if Path(name).expanduser().exists() else hub.parse(name)


def _here(name: str) -> Path:
    if name == "nano":
        return NANO_FOLDER
    if name == "tiny-random":
        from visavis.checkpoints import tiny_random

        return tiny_random.fetch()
    path = Path(name).expanduser()
    if path.exists():
        return path
    raise UnknownNameError(
        f"no model is named {name!r} and no such file or folder exists: {suggest(name, NAMES)} "
        "Otherwise give a name on the hub (owner/name), the path of a .gguf file, or that of a "
        "folder that visavis, transformers or LLaVA wrote."
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
    if profile:
        lookup("profile", profile, PROFILES)
    from visavis.checkpoints.checkpoint import INTEGERS, checkpoint_fingerprint

    path = resolve(name_or_path)
    loaded = _load(
        path,
        precision=precision,
        device=pick_device(device),
        base=None if base is None else resolve(base),
        vision_tower=None if vision_tower is None else resolve(vision_tower),
    )
    if precision in INTEGERS:
        loaded.fingerprint = checkpoint_fingerprint(
            [], {"model": loaded.fingerprint, "bits": precision}
        )
    if chat_template:
        loaded.profile = replace(loaded.profile, chat_template=chat_template)
    if profile:
        embed_as(loaded, profile)
    return loaded


def embed_as(loaded: Checkpoint, profile: str) -> None:
    """Let a model embed, and size its pictures, as a profile says, and chat as before."""
    from visavis.checkpoints.checkpoint import checkpoint_fingerprint

    loaded.profile = loaded.profile.embedding_as(PROFILES[profile])
    if loaded.processor is not None:
        loaded.processor = sized_as(loaded.processor, profile)
    loaded.fingerprint = checkpoint_fingerprint(
        [], {"model": loaded.fingerprint, "profile": profile}
    )


def sized_as(processor: ImageProcessorConfig, profile: str) -> ImageProcessorConfig:
    """Return a processor that sizes pictures and videos as a profile's models were trained."""
    from visavis.processing.anyres import SQUARES
    from visavis.processing.phi3v import CROPS, Phi3VConfig
    from visavis.processing.qwen2_vl import SIZES
    from visavis.processing.video import VideoConfig

    if processor.patches and profile in SIZES:
        sizes = replace(processor.patches, **SIZES[profile])
        processor = replace(processor, patches=sizes, video=VideoConfig(frames=VLM2VEC_FRAMES))
    if processor.tiles and profile in SQUARES:
        tiles = replace(processor.tiles, square=SQUARES[profile])
        processor = replace(processor, tiles=tiles)
    if processor.hd and profile in CROPS:
        processor = replace(processor, hd=Phi3VConfig(CROPS[profile]))
    return processor


def _load(
    path: Path, *, precision: str, device: str, base: Path | None, vision_tower: Path | None
) -> Checkpoint:
    """Find out which layout the files are in, and load them."""
    from visavis.checkpoints.adapters import adapter_chain
    from visavis.checkpoints.detect import CONFIG, KINDS, detect, detect_config
    from visavis.checkpoints.llava.config import is_llava
    from visavis.checkpoints.tensor_files import read_json

    layout = detect(path)
    parts: dict[str, Any] = {"base": base, "vision_tower": vision_tower}
    if layout.kind == "adapter":
        parts["adapters"], base = adapter_chain(path, base)
        if not (base / CONFIG).is_file():
            raise CheckpointError(
                f"{path} is an adapter on {base}, which has no {CONFIG}; expected a folder in "
                "transformers' or LLaVA's original layout as its base."
            )
        # LLaVA's adapters bring its config: their base may be the language model alone.
        whole = (path / CONFIG).is_file() and is_llava(read_json(path / CONFIG))
        layout = detect_config(path if whole else base)
        parts["base"] = base if whole else None
    loader = LOADERS.get(layout.kind)
    if loader is None:
        raise CheckpointError(
            f"{path} is in the layout {layout.title} ({layout.why}), which is not read yet; "
            f"expected one of {', '.join(KINDS[kind] for kind in LOADERS)}."
        )
    given = {name: value for name, value in parts.items() if value is not None}
    takes = {*loader.takes, "base"} if "adapters" in given else {*loader.takes}
    if unused := given.keys() - takes:
        raise InputError(
            f"{unused.pop()} was given for {path}, which has no use for it: it is whole "
            f"({layout.title}: {layout.why}); leave it."
        )
    module, _, function = loader.function.partition(":")
    load = getattr(import_module(f"visavis.checkpoints.{module}"), function)
    loaded: Checkpoint = load(layout.path, precision=precision, device=device, **given)
    return loaded


def pick_device(device: str) -> str:
    """Return "cuda" or "cpu" for "auto", else the device as asked for."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
