"""`visavis convert`: write a checkpoint in another format (see `visavis.convert`)."""

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
FORMATS = "native, transformers, llava, tinyllava, gguf or sentence-transformers"


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT", help="Bundled name, folder, .gguf file or Hugging Face Hub id."
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="Folder to write; for GGUF also a .gguf file.")
    ],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help=f"Target format: {FORMATS}.")],
    precision: Annotated[
        str,
        typer.Option(
            metavar="TYPE",
            help="Weight data type: auto, f32, bf16, f16; native also int8, int4. auto keeps that "
            "of the input (bf16 for a quantised input).",
        ),
    ] = "auto",
    kind: Annotated[
        str,
        typer.Option(
            "--kind",
            metavar="TYPE",
            help="GGUF quantization type, such as Q8_0 or Q4_K_M. Default: F16.",
        ),
    ] = "",
    merge_adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="LoRA adapter to merge into INPUT.")
    ] = None,
    base: BaseOption = None,
    vision_tower: VisionTowerOption = None,
    chat_template: ChatTemplateOption = "",
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Compare outputs of both models on the same inputs; exit 1 if they differ.",
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing OUTPUT.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a checkpoint to another format, with adapters merged and a model card.

    Output is written atomically. Features that the target format cannot represent are errors.

    [bold]Examples[/bold]

      visavis convert nano nano-f32 --to native --precision f32

      visavis convert model.gguf model-hf --to transformers --verify

      visavis convert llava-1.5-7b llava-q4.gguf --to gguf --kind Q4_K_M

      visavis convert vicuna-7b merged --to llava --merge-adapter llava-lora

      visavis convert nano nano-st --to sentence-transformers
    """
    if merge_adapter is not None and base is not None:
        raise InputError(
            "--merge-adapter and --base were given together; expected `INPUT --merge-adapter "
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
        say(f"the {to} format cannot store {setting}")
    if verdict and not verdict.same:
        say(f"error: outputs of {done.out} differ from those of {source}: {verdict.reason}")
        raise typer.Exit(EXIT_DIFFERENT)


def _print(verdict: Verdict) -> None:
    """Print the comparison: one row per check."""
    limits = f"cosine at least {verdict.min_cosine}, KL at most {verdict.max_kl}"
    typer.echo(f"opened by {verdict.asked}; expected: {limits}")
    rows = [["check", "cosine", "KL", ""]]
    for check in verdict.checks:
        near = "" if check.cosine is None else f"{check.cosine:.6f}"
        kl = "" if check.kl is None else f"{check.kl:.2e}"
        rows.append([check.name, near, kl, "" if check.same else "differs"])
    print_columns(rows)
