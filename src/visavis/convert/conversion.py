"""One conversion: load a checkpoint, write it beside its place, put it there whole.

    IN ──load──► Checkpoint ──write──► .OUT.tmp0/OUT ──rename──► OUT
                                           └─ README.md

Until the rename OUT is as it was. An error, a full disk and Ctrl-C leave nothing behind; what a
killed process leaves is removed by the next conversion to OUT. The classes of
`checkpoints/formats.py` write; `verify.py` checks the result.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from visavis.checkpoints.adapters import adapter_chain
from visavis.checkpoints.checkpoint import INTEGERS, Checkpoint
from visavis.checkpoints.checkpoint_format import CheckpointFormat
from visavis.checkpoints.formats import TARGETS, AdapterFormat, detect
from visavis.checkpoints.gguf.load import GGUFFormat, find_parts
from visavis.checkpoints.gguf.reader import open_model
from visavis.checkpoints.load import load_checkpoint, resolve
from visavis.checkpoints.native import CONFIG_NAME, read_config
from visavis.checkpoints.tensor_files import read_headers, weight_files
from visavis.convert.model_card import LICENCE_FILES, model_card
from visavis.errors import CheckpointError, InputError
from visavis.utils import lookup, temporary_folder, write_folder_atomically

PRECISIONS = {"float32": "f32", "float64": "f32", "bfloat16": "bf16", "float16": "f16"}
QUANTISED = "bf16"  # what weights that are stored in fewer bits become, if nothing else is asked
GGUF = ".gguf"


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Attributes:
        loaded: the model that was written, still loaded.
        kind: the type of a GGUF file's tensors.
        files: the files that were written, at their final paths.
        lost: settings that the target layout cannot represent.
    """

    loaded: Checkpoint
    source: Path
    out: Path
    target: str
    precision: str
    kind: str
    files: list[Path]
    lost: list[str] = field(default_factory=list)


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: str,
    precision: str = "auto",
    kind: str = "",
    chat_template: str = "",
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    force: bool = False,
    progress: bool = False,
) -> Conversion:
    """Write a checkpoint in another layout; adapters are merged.

    Args:
        source: what `visavis.load` takes.
        out: a folder that is not there yet, or is empty; for GGUF also a .gguf file.
        to: a name of `TARGETS`.
        precision: what the weights are stored in: "f32", "bf16", "f16", or "auto": as they are in
            the source, bf16 if it is quantised; for our own layout also "int8" and "int4".
        kind: GGUF only: the type of its tensors, such as Q8_0; empty: as `precision`, F16 if
            that is "auto".
        chat_template: see `visavis.load`.
        base: see `visavis.load`.
        vision_tower: see `visavis.load`.
        force: replace a model that is at `out`.

    Raises:
        UnknownNameError: no such layout, model or type.
        InputError: `out` cannot be written, or is not to be replaced.
        CheckpointError: the source cannot be read, or holds a part that the layout does not have.
    """
    target = lookup("layout", to, TARGETS)
    path, out = resolve(source), Path(out).expanduser()
    if kind and not target.has_gguf_types:
        raise InputError(f"kind {kind!r} was given for {to}, which has no kinds; leave it.")
    if precision in INTEGERS and not target.holds_integers:
        fewer = " --kind Q8_0 or Q4_K_M" if target.has_gguf_types else " --to native"
        raise InputError(
            f"precision {precision!r} was given for {to}, which has no place for integers with "
            f"scales as they are kept here; use{fewer}, or precision 'bf16'."
        )
    single = to == "gguf" and out.suffix == GGUF
    _check_place(out, path, force=force, single=single)
    if target.has_gguf_types:
        kind = kind.upper() or ("F16" if precision == "auto" else precision.upper())
    below = None if base is None else resolve(base)
    precision = stored_precision(path, below) if precision == "auto" else precision
    loaded = load_checkpoint(
        path,
        precision=precision,
        device="cpu",
        chat_template=chat_template,
        base=base,
        vision_tower=vision_tower,
    )
    try:
        if single:
            files, lost = _write_beside(target, loaded, out, kind), []
        else:
            with write_folder_atomically(out) as folder:
                written = target.save(loaded, folder, kind=kind, progress=progress)
                named = path.name if os.path.exists(os.path.expanduser(source)) else str(source)
                card = model_card(loaded, path, named, to, kind or precision, written.lost)
                (folder / "README.md").write_text(card, encoding="utf-8")
                for name in LICENCE_FILES:
                    if path.is_dir() and (path / name).is_file():
                        (folder / name).write_bytes((path / name).read_bytes())
            files = sorted(file for file in out.rglob("*") if file.is_file())
            lost = written.lost
    except OSError as error:
        raise InputError(
            f"cannot write {out}: {error.strerror or error}; nothing was left there. Free some "
            "space, or choose another place."
        ) from error
    return Conversion(loaded, path, out, to, precision, kind, files, lost)


def stored_precision(path: Path, base: Path | None = None) -> str:
    """Return the type that most of a checkpoint's weights are stored in: "f32", "bf16" or "f16".

    Raises:
        CheckpointError: its files are damaged, or of no layout that is known.
    """
    sizes: Counter[str] = Counter()
    found = detect(path).format
    if found is GGUFFormat:
        file, _ = open_model(find_parts(path)[0] if path.is_dir() else path)
        names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        for tensor in file.tensors.values():
            type_name = str(getattr(tensor.type, "name", tensor.type))
            sizes[names.get(type_name, type_name)] += math.prod(tensor.shape)
    else:
        if found is AdapterFormat:
            _, path = adapter_chain(path, base)
        elif base is not None:
            path = base
        if (path / CONFIG_NAME).is_file() and "bundle" in read_config(path):
            return QUANTISED
        # Wherever they lie: TinyLLaVA has a folder for each part.
        files = sorted(path.rglob("*.safetensors")) or sorted(path.rglob("pytorch_model*.bin"))
        for stored in read_headers(files or weight_files(path)).values():
            sizes[str(stored.dtype).removeprefix("torch.")] += math.prod(stored.shape)
    most = sizes.most_common(1)
    return PRECISIONS.get(most[0][0], QUANTISED) if most else QUANTISED


def _write_beside(
    target: type[CheckpointFormat], loaded: Checkpoint, out: Path, kind: str
) -> list[Path]:
    """Write a model that is single files, and put them into their folder one after the other."""
    with temporary_folder(out) as folder:
        files = target.save(loaded, folder / out.name, kind=kind).files
        for file in reversed(files):  # the model itself comes last
            file.replace(out.parent / file.name)
    return [out.parent / file.name for file in files]


def _check_place(out: Path, source: Path, *, force: bool, single: bool) -> None:
    """Check that the output path may be written.

    Raises:
        InputError: it may not; the message names the reason and a remedy.
    """
    ours, theirs = out.resolve(), source.resolve()
    if ours == theirs or ours in theirs.parents:
        raise InputError(f"OUT is {out}, which holds the model to convert; choose another place.")
    if single:
        if os.path.exists(out) and not force:
            raise InputError(f"{out} exists; replace it with --force, or choose another name.")
        return
    if os.path.exists(out) and not os.path.isdir(out):
        raise InputError(f"{out} is a file, expected the name of a new folder.")
    if not os.path.isdir(out) or not any(out.iterdir()):
        return
    if not force:
        raise InputError(
            f"{out} is not empty; replace what is in it with --force, or choose another place."
        )
    try:
        if not any(out.glob(f"*{GGUF}")):
            detect(out)
    except CheckpointError as error:
        raise InputError(
            f"{out} holds something else than a model, which --force does not replace; empty it "
            "yourself, or choose another place."
        ) from error
