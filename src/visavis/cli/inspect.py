"""`visavis inspect`: what a checkpoint is made of, read from its headers; no weights are loaded."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from visavis.cli.console import (
    JsonOption,
    ModelArgument,
    human_bytes,
    print_columns,
    print_json,
    say,
)

if TYPE_CHECKING:
    from visavis.checkpoints.names import NameTable
    from visavis.checkpoints.weight_files import TensorFiles
    from visavis.model.config import VLMConfig
    from visavis.processing.images import ImageProcessorConfig


def inspect(model: ModelArgument, as_json: JsonOption = False) -> None:
    """Show a checkpoint's parts, sizes and prompt profile without loading its weights.

    [bold]Examples[/bold]

      visavis inspect nano

      visavis inspect model.gguf --json
    """
    from visavis.checkpoints.load import resolve

    path = resolve(model)
    facts = _facts(path)
    if as_json:
        print_json(facts)
        return
    typer.secho(f"{facts['name']}", bold=True, nl=False)
    typer.echo(f"  ({facts['layout']}, {path})")
    rows = [
        [f"  {part['part']}", f"{part['parameters'] / 1e6:.1f} M", part["details"]]
        for part in facts["parts"]
    ]
    total = sum(part["parameters"] for part in facts["parts"])
    print_columns([*rows, ["  in all", f"{total / 1e6:.1f} M", "parameters"]])
    for title in ("profile", "pictures", "tensor_types", "files"):
        if facts.get(title):
            typer.secho(title.replace("_", " "), bold=True)
            # Templates hold line breaks: shown as \n, or the columns would break.
            rows = [[f"  {key}", str(v).replace("\n", "\\n")] for key, v in facts[title].items()]
            print_columns(rows)
    for problem in facts.get("problems", []):
        say(f"problem: {problem}")


def _facts(path: Path) -> dict[str, Any]:
    """Return what the headers of a checkpoint say, whichever layout it is in."""
    from visavis.checkpoints import adapters, native
    from visavis.checkpoints.llava.layout import is_llava
    from visavis.checkpoints.transformers import folder as transformers_folder
    from visavis.checkpoints.weight_files import read_json

    config = path / transformers_folder.CONFIG_NAME
    if not path.is_dir():
        return _gguf(path)
    if adapters.is_adapter(path):
        return _adapter(path)
    if (path / native.CONFIG_NAME).is_file() or not config.is_file():
        return _folder(path)
    data = read_json(config)
    if data.get("model_type") == "phi3_v":
        return _phi3v(path)
    return _llava(path) if is_llava(data) else _transformers(path)


def _folder(path: Path) -> dict[str, Any]:
    from visavis.checkpoints import bundled
    from visavis.checkpoints.native import read_config
    from visavis.errors import CheckpointError
    from visavis.model.config import vlm_config_from_dict

    data = read_config(path)
    try:
        config = vlm_config_from_dict(data["config"])
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{path} has a config this version cannot read: {error}") from error
    files = {file.name: human_bytes(file.stat().st_size) for file in sorted(path.glob("*.*"))}
    if "bundle" in data:
        for wheel in bundled.BUNDLED[data["bundle"]].values():
            cached = bundled.cache_dir() / data["bundle"] / wheel.file_name
            state = "in the cache" if cached.is_file() else "to be fetched on first use"
            files[wheel.file_name] = f"{human_bytes(wheel.member_num_bytes)}, {state}"
    return {
        "name": data["name"],
        "layout": "visavis folder",
        "path": str(path),
        "parts": _parts(config),
        "profile": {key: value for key, value in data["profile"].items() if value},
        "files": files,
    }


def _transformers(path: Path) -> dict[str, Any]:
    from visavis.checkpoints.transformers.config import vlm_config
    from visavis.checkpoints.transformers.folder import (
        CONFIG_NAME,
        chat_template,
        image_processor,
        refuse_quantised,
    )
    from visavis.checkpoints.transformers.layout import vlm_table
    from visavis.checkpoints.weight_files import read_json, read_tensors, weight_files

    data = read_json(path / CONFIG_NAME)
    refuse_quantised(data, path)
    config, files = vlm_config(data), weight_files(path)
    tensors = read_tensors(files)
    return {
        "name": path.resolve().name,
        "layout": "transformers",
        "path": str(path),
        "parts": _parts(config),
        "profile": {
            "architecture": data["model_type"],
            "chat template": "in the folder" if chat_template(path) else "none",
        },
        "pictures": _pictures(image_processor(config, path)),
        "tensor_types": _types(tensors),
        "files": _sizes([path / CONFIG_NAME, *files], path),
        "problems": _problems(config, vlm_table(data, config), tensors, path),
    }


def _llava(path: Path) -> dict[str, Any]:
    from visavis.checkpoints.llava.folder import open_llava
    from visavis.checkpoints.transformers.folder import CONFIG_NAME, chat_template

    found = open_llava(path)
    template = "in the folder" if chat_template(path) else "none, name one of visavis' turns"
    return {
        "name": path.resolve().name,
        "layout": "LLaVA, original",
        "path": str(path),
        "parts": _parts(found.config),
        "profile": {
            "architecture": found.text["model_type"],
            "vision tower": found.data["mm_vision_tower"],
            "chat template": found.turns or template,
        },
        "pictures": _pictures(found.processor),
        "tensor_types": _types(found.tensors),
        "files": _sizes([path / CONFIG_NAME, *found.files], path),
        "problems": [str(found.lacking)]
        if found.lacking
        else _problems(found.config, found.table, found.tensors, path),
    }


def _phi3v(path: Path) -> dict[str, Any]:
    from visavis.checkpoints.phi3v.folder import open_phi3v
    from visavis.checkpoints.transformers.folder import CONFIG_NAME

    found = open_phi3v(path)
    return {
        "name": path.resolve().name,
        "layout": "Phi-3.5-vision",
        "path": str(path),
        "parts": _parts(found.config),
        "profile": {"architecture": "phi3", "chat template": "phi3_v"},
        "pictures": _pictures(found.processor),
        "tensor_types": _types(found.tensors),
        "files": _sizes([path / CONFIG_NAME, *found.files], path),
        "problems": _problems(found.config, found.table, found.tensors, path),
    }


def _adapter(path: Path) -> dict[str, Any]:
    from visavis.checkpoints.adapters import CONFIG_NAME, read_adapter

    adapter = read_adapter(path)
    pairs = adapter.low_rank.values()
    ranks = ", ".join(map(str, sorted({pair.a.shape[0] for pair in pairs})))
    added = [
        math.prod(one.shape) for p in pairs for one in (p.a, p.b, p.magnitude) if one is not None
    ]
    whole = [math.prod(stored.shape) for stored in adapter.replaced.values()]
    return {
        "name": path.resolve().name,
        "layout": "LoRA adapter",
        "path": str(path),
        "parts": [
            {
                "part": "adapter",
                "parameters": sum(added) + sum(whole),
                "details": f"rank {ranks} on {len(pairs)} matrices, {len(whole)} tensors whole",
            }
        ],
        "profile": {
            "base": adapter.config.get("base_model_name_or_path", "not named"),
            "kind": "DoRA" if adapter.config.get("use_dora") else "LoRA",
        },
        "files": _sizes([path / CONFIG_NAME, *adapter.files], path),
    }


def _gguf(path: Path) -> dict[str, Any]:
    from visavis.checkpoints.gguf import decoder as gguf_decoder
    from visavis.checkpoints.gguf.split import open_model
    from visavis.model.config import VLMConfig

    file, paths = open_model(path)
    types = Counter(str(getattr(t.type, "name", t.type)) for t in file.tensors.values())
    has_template = "tokenizer.chat_template" in file.metadata
    return {
        "name": str(file.metadata.get("general.name", path.stem)),
        "layout": "GGUF" if len(paths) == 1 else f"GGUF in {len(paths)} files",
        "path": str(path),
        "parts": _parts(VLMConfig(decoder=gguf_decoder.decoder_config(file))),
        "profile": {
            "architecture": file.metadata.get("general.architecture", "unknown"),
            "chat template": "in the file" if has_template else "none",
        },
        "tensor_types": _counted(types),
        "files": _sizes(paths, path.parent),
    }


def _problems(config: VLMConfig, table: NameTable, tensors: TensorFiles, path: Path) -> list[str]:
    """Return what keeps the tensors from fitting the config, found by names and shapes alone."""
    import torch

    from visavis.checkpoints.transformers.layout import read_as
    from visavis.errors import CheckpointError

    shapes = {
        name: torch.empty(stored.shape, dtype=stored.dtype, device="meta")
        for name, stored in tensors.entries.items()
    }
    if config.decoder.tied_head:  # a head of its own is compared by value when it is loaded
        shapes = {name: t for name, t in shapes.items() if not name.endswith("lm_head.weight")}
    try:
        read_as(config, table, shapes, where=str(path))
    except CheckpointError as error:
        return [str(error)]
    return []


def _pictures(processor: ImageProcessorConfig | None) -> dict[str, str]:
    if processor is None:
        return {}
    ways = {
        "squash": "squeezed to a square",
        "crop": "shortest edge resized, middle cut out",
        "pad": "padded to a square with the mean colour",
        "patches": "any size",
        "hd": "tiles, and a view of all of it",
    }
    return {
        "size": f"{processor.size} px, {ways[processor.resize]}",
        "resample": processor.resample,
        "mean": ", ".join(f"{value:.4g}" for value in processor.mean),
        "std": ", ".join(f"{value:.4g}" for value in processor.std),
    }


def _types(tensors: TensorFiles) -> dict[str, str]:
    kinds = (str(stored.dtype).removeprefix("torch.") for stored in tensors.entries.values())
    return _counted(Counter(kinds))


def _counted(types: Counter[str]) -> dict[str, str]:
    return {name: f"{number} tensors" for name, number in types.most_common()}


def _sizes(files: list[Path], folder: Path) -> dict[str, str]:
    """Return sizes by path, relative where the file lies within the checkpoint."""
    inside = {
        file: file.relative_to(folder).as_posix() if file.is_relative_to(folder) else str(file)
        for file in files
    }
    return {name: human_bytes(file.stat().st_size) for file, name in inside.items()}


def _parts(config: VLMConfig) -> list[dict[str, Any]]:
    """Count each part's parameters on torch's meta device, which holds no numbers."""
    import torch

    from visavis.model.config import Qwen2VLTowerConfig
    from visavis.model.vlm import VLM

    with torch.device("meta"):
        vlm = VLM(config)
    decoder = config.decoder
    details = {
        "decoder": (
            f"{decoder.num_layers} layers × {decoder.width}, vocabulary {decoder.vocab_size}, "
            f"context {decoder.context_length}"
        )
    }
    if isinstance(config.tower, Qwen2VLTowerConfig):
        side = config.tower.patch_size * config.tower.merge
        details["tower"] = f"{config.tower.kind}, any size"
        details["connector"] = f"a token for {side} x {side} px"
    elif config.tower and config.connector:
        details["tower"] = f"{config.tower.kind}, {config.tower.image_size} px"
        details["connector"] = (
            f"{config.connector.kind}, {config.tokens_per_image} tokens per picture"
        )
    if config.head:
        details["head"] = f"{config.head.dim} dimensions from layers {config.head.layers}"
    names = {
        "tower": "vision tower",
        "connector": "connector",
        "decoder": "language model",
        "head": "embedding head",
    }
    parts = []
    for attribute, name in names.items():
        module = getattr(vlm, attribute)
        if module is not None:
            unique = {id(p): p.numel() for p in module.parameters()}
            parts.append(
                {"part": name, "parameters": sum(unique.values()), "details": details[attribute]}
            )
    return parts
