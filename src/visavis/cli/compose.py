"""`visavis compose`: build a model from a language model, a vision tower and a new connector."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from visavis.cli.common import JsonOption, human_bytes, print_json
from visavis.errors import InputError


def compose(
    out: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to write; must not exist.")],
    settings: Annotated[
        list[str],
        typer.Argument(metavar="NAME=VALUE", help="Settings, as under `model` in a recipe."),
    ],
    seed: Annotated[
        int, typer.Option(metavar="N", help="Random seed for connector initialisation.")
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Build a model from a language model, a vision tower and a new connector.

    The connector is randomly initialised; train it with `visavis train` before use.

    [bold]Examples[/bold]

      visavis compose new/ language_model=smollm2-135m vision_tower=efficientnet-lite2

      visavis compose new/ language_model=Qwen/Qwen2-0.5B vision_tower=siglip-folder/ --seed 1
    """
    from visavis.checkpoints import compose as parts
    from visavis.checkpoints.native import write_native
    from visavis.train.recipe import read_model
    from visavis.utils import write_folder_atomically

    model = read_model(settings)
    if model.base or model.lora or model.quantize:
        raise InputError(
            "base, lora and quantize are of training, expected language_model and vision_tower"
        )
    if os.path.exists(out):
        raise InputError(f"{out} exists, expected a name that is free; remove it, or name another")
    made = parts.compose(model.composition(), seed=seed)
    with write_folder_atomically(out) as temporary:
        write_native(made, temporary)
    size = sum(file.stat().st_size for file in out.iterdir())
    if as_json:
        print_json({"model": str(out), "name": made.name, "bytes": size})
    else:
        typer.echo(f"{out} ({human_bytes(size)}): {made.name}, connector not trained yet")
