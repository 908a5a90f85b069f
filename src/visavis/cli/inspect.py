"""`visavis inspect`: what a checkpoint is made of, read from its headers; no weights are loaded."""

from __future__ import annotations

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
)

if TYPE_CHECKING:
    from visavis.model.config import VLMConfig


def inspect(model: ModelArgument, as_json: JsonOption = False) -> None:
    """Show a checkpoint's parts, sizes and prompt profile without loading its weights.

    [bold]Examples[/bold]

      visavis inspect nano

      visavis inspect model.gguf --json
    """
    from visavis.checkpoints.load import resolve

    path = resolve(model)
    facts = _folder(path) if path.is_dir() else _gguf(path)
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
    for title in ("profile", "tensor_types", "files"):
        if facts.get(title):
            typer.secho(title.replace("_", " "), bold=True)
            # Templates hold line breaks: shown as \n, or the columns would break.
            rows = [[f"  {key}", str(v).replace("\n", "\\n")] for key, v in facts[title].items()]
            print_columns(rows)


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


def _gguf(path: Path) -> dict[str, Any]:
    from visavis.checkpoints import gguf_llama
    from visavis.checkpoints.gguf import open_gguf
    from visavis.model.config import VLMConfig

    file = open_gguf(path)
    types = Counter(str(getattr(t.type, "name", t.type)) for t in file.tensors.values())
    has_template = "tokenizer.chat_template" in file.metadata
    return {
        "name": str(file.metadata.get("general.name", path.stem)),
        "layout": "GGUF",
        "path": str(path),
        "parts": _parts(VLMConfig(decoder=gguf_llama.decoder_config(file))),
        "profile": {
            "architecture": file.metadata.get("general.architecture", "unknown"),
            "chat template": "in the file" if has_template else "none",
        },
        "tensor_types": {name: f"{number} tensors" for name, number in types.most_common()},
        "files": {path.name: human_bytes(path.stat().st_size)},
    }


def _parts(config: VLMConfig) -> list[dict[str, Any]]:
    """Count each part's parameters on torch's meta device, which holds no numbers."""
    import torch

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
    if config.tower:
        details["tower"] = f"{config.tower.kind}, {config.tower.image_size} px"
    if config.connector:
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
