"""`visavis inspect`: describe a checkpoint from its headers, or compare two."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visavis.cli.common import (
    JsonOption,
    ModelArgument,
    human_bytes,
    print_columns,
    print_json,
    say,
)

if TYPE_CHECKING:
    from visavis.checkpoints.checkpoint_format import CheckpointFormat
    from visavis.checkpoints.compare import Comparison
    from visavis.model.config import VLMConfig
    from visavis.processing.config import ImageProcessorConfig

EXIT_DIFFERENT = 1
MAX_LISTED = 10
WAYS = {
    "squash": "resized to a square",
    "crop": "shortest edge resized, center crop",
    "pad": "padded to a square with the mean colour",
    "patches": "native resolution, in patches",
    "hd": "high-resolution tiles and a global view",
    "naflex": "any aspect ratio, in patches",
    "ratio": "square tiles of the nearest aspect ratio and a global view",
    "split": "longest edge resized, square tiles and a global view",
    "gemma": "any aspect ratio, in squares of patches",
}


def inspect(
    model: ModelArgument,
    other: Annotated[
        str, typer.Argument(metavar="OTHER", help="Compare with this checkpoint.")
    ] = "",
    top: Annotated[
        int,
        typer.Option(
            "--top-k",
            "-k",
            min=1,
            metavar="N",
            help="Number of most different tensors to list in a comparison.",
        ),
    ] = MAX_LISTED,
    as_json: JsonOption = False,
) -> None:
    """Show the format, architecture, sizes and prompt settings of a checkpoint.

    Reads headers only. With a second checkpoint, lists differences of settings, tensors and values;
    exit code 0 if they are equal, 1 if they differ, 2 on an error.

    [bold]Examples[/bold]

      visavis inspect nano

      visavis inspect model.gguf --json

      visavis inspect base-folder tuned-folder
    """
    from visavis.checkpoints.compare import compare
    from visavis.checkpoints.inspect import describe
    from visavis.checkpoints.load import resolve

    found = describe(resolve(model))
    if not other:
        show = print_json if as_json else _show
        show(facts(found))
        return
    second = describe(resolve(other))
    difference = compare(found, second)
    (print_json if as_json else _show_difference)(_difference(found, second, difference, top))
    if not difference.same:
        raise typer.Exit(EXIT_DIFFERENT)


def facts(found: CheckpointFormat) -> dict[str, Any]:
    """Describe a checkpoint as JSON-serialisable values."""
    from visavis.checkpoints.inspect import parts

    types = Counter(entry.type for entry in found.tensors.values())
    return {
        "name": found.name,
        "layout": found.title,
        "kind": found.kind,
        "why": found.detected.why,
        "path": str(found.path),
        "parts": parts(found),
        "profile": found.facts,
        "images": _preprocessing(found.processor),
        "quirks": {} if found.config is None else quirks(found.config),
        "tensor_types": {name: f"{number} tensors" for name, number in types.most_common()},
        "files": _sizes(found.files, found.path),
        "problems": found.problems,
    }


def quirks(config: VLMConfig) -> dict[str, str]:
    """Return per part of the model the settings that differ from the defaults."""
    parts: dict[str, Any] = {
        "whole": config,
        "merge": config.merge,
        "vision tower": config.tower,
        "connector": config.connector,
        "language model": config.decoder if config.has_decoder else None,
        "text tower": config.text_tower,
        "embedding head": config.head,
    }
    found = {}
    for name, part in parts.items():
        changed = []
        for field in dataclasses.fields(part) if part is not None else ():
            value = getattr(part, field.name)
            if field.default in (dataclasses.MISSING, value) or value in parts.values():
                continue
            value = getattr(value, "kind", value)  # of a stretched context, for one
            changed.append(f"{field.name}={f'{value:g}' if isinstance(value, float) else value}")
        if changed:
            found[name] = ", ".join(changed)
    return found


def _preprocessing(processor: ImageProcessorConfig | None) -> dict[str, str]:
    """Describe image and video preprocessing."""
    if processor is None:
        return {}
    found = {
        "size": f"{processor.size} px, {WAYS[processor.resize]}",
        "resample": processor.resample,
        "mean": ", ".join(f"{value:.4g}" for value in processor.mean),
        "std": ", ".join(f"{value:.4g}" for value in processor.std),
    }
    if tiles := processor.tiles:
        most = max(math.prod(grid) for grid in tiles.grids) // processor.size**2
        several = {"tile": "tiled", "pad": "padded to one tile"}[tiles.multi_image]
        found["tiles"] = (
            f"at most {most}, {len(tiles.grids)} grids ({tiles.axes}); each of several images is "
            f"{several}"
        )
    if processor.naflex:
        found["patches"] = f"at most {processor.naflex.max_patches}"
    if hd := processor.hd:
        found["tiles"] = f"at most {hd.num_crops}"
    if ratio := processor.ratio:
        found["tiles"] = f"{ratio.min_tiles} to {ratio.max_tiles}, and the whole"
    if split := processor.split:
        most = -(-split.longest_edge // processor.size)
        found["tiles"] = f"at most {most} × {most} and the whole" if split.cut else "none"
    if patches := processor.patches:
        found["patches"] = (
            f"{patches.patch} px, {patches.merge} × {patches.merge} per token, "
            f"{patches.min_pixels} to {patches.max_pixels} pixels per image"
        )
    if video := processor.video:
        rate = f", {video.fps:g} fps" if video.fps else ""
        found["videos"] = f"{video.frames} frames{rate}, at most {video.max_frames}"
    return found


def _sizes(files: list[Path], folder: Path) -> dict[str, str]:
    """Return file sizes by path, relative to the checkpoint folder where possible."""
    found = {}
    for file in files:
        inside = file.is_relative_to(folder) and file != folder
        name = file.relative_to(folder).as_posix() if inside else str(file)
        if file.parent == folder.parent and not folder.is_dir():
            name = file.name
        found[name] = human_bytes(file.stat().st_size) if file.is_file() else "not downloaded"
    return found


def _difference(
    a: CheckpointFormat, b: CheckpointFormat, found: Comparison, top: int
) -> dict[str, Any]:
    largest = [
        {"tensor": name, "max_abs": value if math.isfinite(value) else None}
        for name, value in list(found.values.items())[:top]
    ]
    return {
        "same": found.same,
        "a": {"name": a.name, "layout": a.title, "path": str(a.path)},
        "b": {"name": b.name, "layout": b.title, "path": str(b.path)},
        "settings": found.settings,
        "only_in_a": found.only_in_a,
        "only_in_b": found.only_in_b,
        "shapes": found.shapes,
        "types": found.types,
        "values": {
            "compared": found.compared,
            "different": len(found.values),
            "largest": largest,
        },
    }


def _show(whole: dict[str, Any]) -> None:
    typer.secho(whole["name"], bold=True, nl=False)
    typer.echo(f"  ({whole['layout']}: {whole['why']}; {whole['path']})")
    rows = [
        [f"  {part['part']}", f"{part['parameters'] / 1e6:.1f} M", part["details"]]
        for part in whole["parts"]
    ]
    total = sum(part["parameters"] for part in whole["parts"])
    print_columns([*rows, ["  total", f"{total / 1e6:.1f} M", "parameters"]])
    for title in ("profile", "images", "quirks", "tensor_types", "files"):
        if whole[title]:
            typer.secho(title.replace("_", " "), bold=True)
            # Templates hold line breaks: shown as \n, or the columns would break.
            rows = [[f"  {key}", str(v).replace("\n", "\\n")] for key, v in whole[title].items()]
            print_columns(rows)
    for problem in whole["problems"]:
        say(f"problem: {problem}")


def _show_difference(whole: dict[str, Any]) -> None:
    for key in ("a", "b"):
        typer.echo(f"{key}: {whole[key]['name']}  ({whole[key]['layout']}, {whole[key]['path']})")
    for title in ("settings", "shapes", "types"):
        if whole[title]:
            typer.secho(title, bold=True)
            pairs = list(whole[title].items())
            print_columns([[f"  {key}", a, "→", b] for key, (a, b) in pairs])
    for key in ("only_in_a", "only_in_b"):
        if names := whole[key]:
            typer.secho(f"{key.replace('_', ' ')}: {len(names)} tensors", bold=True)
            more = [f"and {len(names) - MAX_LISTED} more"] if len(names) > MAX_LISTED else []
            for name in [*names[:MAX_LISTED], *more]:
                typer.echo(f"  {name}")
    values = whole["values"]
    typer.secho(f"values: {values['different']} of {values['compared']} tensors differ", bold=True)
    rows = [(one["tensor"], one["max_abs"]) for one in values["largest"]]
    if rows:
        print_columns(
            [[f"  {name}", "not finite" if n is None else f"{n:.3g}"] for name, n in rows]
        )
    if whole["same"]:
        typer.echo("no differences")
