"""`visavis compose`: write a new model of parts that exist, its connector not trained yet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from visavis.cli.common import JsonOption, human_bytes, print_json
from visavis.errors import InputError


def compose(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    settings: Annotated[
        list[str],
        typer.Argument(metavar="NAME=VALUE...", help="As under `model` in a recipe."),
    ],
    seed: Annotated[int, typer.Option(help="Of the new connector's numbers.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Put a language model and a vision tower together, with a new connector between.

    What comes out makes no sense of pictures before it is trained, see `visavis train`.

    [bold]Examples[/bold]

      visavis compose mine/ language_model=smollm2-135m vision_tower=efficientnet-lite2
      connector.kind=linear connector.shuffle=3

      visavis compose mine/ language_model=Qwen/Qwen2-0.5B
      vision_tower=google/siglip-so400m-patch14-384 connector.depth=2
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
    if out.exists():
        raise InputError(f"{out} exists, expected a name that is free; remove it, or name another")
    made = parts.compose(model.composition(), seed=seed)
    with write_folder_atomically(out) as temporary:
        write_native(made, temporary)
    size = sum(file.stat().st_size for file in out.iterdir())
    if as_json:
        print_json({"model": str(out), "name": made.name, "bytes": size})
    else:
        typer.echo(f"{out} ({human_bytes(size)}): {made.name}, connector not trained yet")
