"""`visavis convert`: a checkpoint in any layout, written in another. The work is in
`visavis.convert`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visavis.cli.common import (
    BaseOption,
    ChatTemplateOption,
    JsonOption,
    VisionTowerOption,
    human_bytes,
    print_columns,
    print_json,
    say,
    show_progress,
)
from visavis.errors import InputError

if TYPE_CHECKING:
    from visavis.convert.verify import Verdict

EXIT_DIFFERENT = 1
LAYOUTS = "native, transformers, llava, tinyllava, gguf or sentence-transformers"


def convert(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="A bundled name, a folder or a .gguf file.")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="A new folder; for gguf also a .gguf file.")
    ],
    to: Annotated[str, typer.Option("--to", help=f"The layout: {LAYOUTS}.")],
    precision: Annotated[
        str,
        typer.Option(
            help="What weights are stored in: f32, bf16, f16; auto: as in the source, bf16 if that "
            "is quantised. Native: int8, int4 too."
        ),
    ] = "auto",
    kind: Annotated[
        str,
        typer.Option(
            "--kind", help="With gguf: the type of its tensors, such as Q8_0; F16 if not given."
        ),
    ] = "",
    merge_adapter: Annotated[
        Path | None, typer.Option(help="A LoRA adapter of IN, merged into it.")
    ] = None,
    base: BaseOption = None,
    vision_tower: VisionTowerOption = None,
    chat_template: ChatTemplateOption = "",
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Ask IN and OUT the same and compare; exit 1 if they differ."
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a model that is at OUT.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint in another layout, adapters merged, with a model card.

    OUT appears whole or not at all. What a layout has no words for is an error that names it.

    [bold]Examples[/bold]

      visavis convert nano nano-f32 --to native --precision f32

      visavis convert model.gguf model-hf --to transformers --verify

      visavis convert llava-1.5-7b llava-q4.gguf --to gguf --kind Q4_K_M

      visavis convert vicuna-7b merged --to llava --merge-adapter llava-lora

      visavis convert nano nano-st --to sentence-transformers
    """
    if merge_adapter is not None and base is not None:
        raise InputError(
            "--merge-adapter and --base were given together; expected `IN --merge-adapter "
            "ADAPTER`, or `ADAPTER --base MODEL`."
        )
    from visavis.convert import convert as write

    model, below = (source, base) if merge_adapter is None else (str(merge_adapter), source)
    done = write(
        model,
        out,
        to=to,
        precision=precision,
        kind=kind,
        chat_template=chat_template,
        base=below,
        vision_tower=vision_tower,
        force=force,
        progress=show_progress(),
    )
    verdict = None
    if verify:
        from visavis.convert.verify import verify as compare

        verdict = compare(done)
    size = sum(file.stat().st_size for file in done.files)
    if as_json:
        names = [str(file.relative_to(done.out.parent)) for file in done.files]
        summary: dict[str, Any] = {
            "out": str(done.out),
            "to": to,
            "precision": done.precision,
            **({"kind": done.kind} if done.kind else {}),
            "bytes": size,
            "files": names,
            "lost": done.lost,
        }
        print_json(summary | ({"verify": verdict.to_dict()} if verdict else {}))
    else:
        typer.echo(f"{done.out}: {to}, {human_bytes(size)} in {len(done.files)} files")
        if verdict:
            _print(verdict)
    for setting in done.lost:
        say(f"this layout has no place for {setting}")
    if verdict and not verdict.same:
        say(f"error: {done.out} does not answer as {source} does: {verdict.reason}")
        raise typer.Exit(EXIT_DIFFERENT)


def _print(verdict: Verdict) -> None:
    """Print one row per check, and who answered."""
    limits = f"cosine at least {verdict.min_cosine}, KL at most {verdict.max_kl}"
    typer.echo(f"opened by {verdict.asked}; expected: {limits}")
    rows = [["check", "cosine", "KL", ""]]
    for check in verdict.checks:
        near = "" if check.cosine is None else f"{check.cosine:.6f}"
        kl = "" if check.kl is None else f"{check.kl:.2e}"
        rows.append([check.name, near, kl, "" if check.same else "differs"])
    print_columns(rows)
