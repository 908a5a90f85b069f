"""`visavis mine`: negatives for training, as JSON lines that a recipe joins.

What is chosen and why is in `data/negatives.py`; here is where samples come from.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visavis.cli.console import print_json, say, show_progress
from visavis.cli.options import JsonOption, Loading, ModelArgument, loads_a_model
from visavis.errors import InputError

if TYPE_CHECKING:
    from visavis.api import Model
    from visavis.data.formats import Source
    from visavis.data.scene_graph import Labels

SHOWN = 5  # of what was left out


@loads_a_model
def mine(
    model: ModelArgument,
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="Data to train on, or a recipe (see --source).")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Write JSON lines {id, negatives}.")],
    source: Annotated[str, typer.Option(help="Of a recipe: the source, by name.")] = "",
    root: Annotated[
        Path | None, typer.Option("--data", help="Of a recipe: the folder of data sets.")
    ] = None,
    form: Annotated[
        str,
        typer.Option("--format", help="Of data: its format, where its first record is not enough."),
    ] = "",
    images: Annotated[
        Path | None, typer.Option(help="Of data: where paths of pictures start.")
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="JSON lines of more items to find, {text, image, video}.")
    ] = None,
    nearest: Annotated[int, typer.Option(help="Nearest to the query, at most.")] = 8,
    labels: Annotated[int, typer.Option(help="Texts nearest to the right text.")] = 0,
    same_image: Annotated[int, typer.Option(help="What is said of the same picture.")] = 0,
    total: Annotated[int, typer.Option(help="Fill up with random ones to so many.")] = 0,
    ratio: Annotated[
        float, typer.Option(help="No score above this share of the positive's; 0: any.")
    ] = 0.95,
    margin: Annotated[
        float | None, typer.Option(help="No score less than this below the positive's.")
    ] = None,
    max_score: Annotated[float | None, typer.Option(help="No score above this.")] = None,
    min_score: Annotated[float | None, typer.Option(help="No score below this.")] = None,
    skip: Annotated[int, typer.Option(help="Leave out so many of the nearest.")] = 0,
    depth: Annotated[int, typer.Option(help="Look at so many of the nearest.")] = 100,
    sample: Annotated[bool, typer.Option(help="Draw among them, not the nearest first.")] = False,
    seed: Annotated[int, typer.Option(help="Another draw.")] = 0,
    faiss: Annotated[bool, typer.Option("--faiss", help="Search with FAISS.")] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Where vectors are kept; else beside --out.")
    ] = None,
    label_files: Annotated[
        Path | None, typer.Option(help="Of scene graphs: write the three label files here.")
    ] = None,
    vocabulary: Annotated[
        Path | None, typer.Option(help="Of scene graphs: predicates with commas between them.")
    ] = None,
    as_json: JsonOption = False,
    *,
    loading: Loading,
) -> None:
    """Find hard negatives: items near a query, or near the right answer, that are not right.

    Texts, pictures and videos alike. Stop it whenever you like: vectors are kept, and the same
    command goes on. A recipe takes the file as a source's `negatives`.

    [bold]Examples[/bold]

      visavis mine nano pairs.jsonl -o negatives.jsonl

      visavis mine nano pairs.jsonl -o negatives.jsonl --nearest 4 --skip 10 --depth 50 --sample

      visavis mine nano recipes/my.yaml --source coco --data DATA -o DATA/coco/negatives.jsonl

      visavis mine nano vg150.json --images VG -o negatives.jsonl --nearest 0 --labels 8
      --same-image 4 --total 12 --label-files labels
    """
    from visavis.data.catalogue import Catalogue
    from visavis.data.mined import read_corpus, write_mined
    from visavis.data.negatives import Mining, Report
    from visavis.data.negatives import mine as mined
    from visavis.data.vectors import VectorStore

    settings = Mining(
        nearest=nearest,
        labels=labels,
        same_image=same_image,
        total=total,
        ratio=ratio or None,
        margin=margin,
        max_score=max_score,
        min_score=min_score,
        skip=skip,
        depth=depth,
        sample=sample,
        seed=seed,
        faiss=faiss,
    )
    if out.is_dir():
        raise InputError(f"--out {out} is a folder, expected the name of a file for JSON lines")
    samples = _recipe(data, source, root) if data.suffix in (".yaml", ".yml") else None
    samples = samples or _file(data, form, images)
    others = read_corpus(corpus) if corpus is not None else []

    loaded = loading.load(model)
    kept = cache if cache is not None else out.with_name(f"{out.stem}-vectors")
    catalogue = Catalogue(samples, others, progress=show_progress())
    report = Report()
    with VectorStore(kept / _identity(loaded, loading.precision), loaded.embedding_dim) as store:
        found = mined(
            loaded,
            catalogue,
            settings,
            store,
            report,
            device=loaded.device,
            progress=show_progress(),
        )
        write_mined(out, catalogue, found)
        if label_files is not None:
            _write_labels(label_files, samples, loaded, vocabulary)
    for name, reason in report.left_out[:SHOWN]:
        say(f"left out: {name}: {reason}")
    if len(report.left_out) > SHOWN:
        say(f"{len(report.left_out) - SHOWN} more are left out; --json lists all")
    if as_json:
        print_json(
            {
                "output": str(out),
                "model": loaded.name,
                "fingerprint": loaded.fingerprint,
                "settings": vars(settings),
                **{name: value for name, value in vars(report).items() if name != "left_out"},
                "left_out": [{"id": name, "reason": reason} for name, reason in report.left_out],
            }
        )
        return
    sums = ", ".join(f"{number} {name}" for name, number in report.sources.items()) or "none"
    typer.echo(
        f"{out}: negatives for {report.samples} samples among {report.items} items: {sums}; "
        f"{report.embedded} vectors computed, {report.reused} kept"
    )
    if report.short:
        say(f"{report.short} samples have fewer negatives than asked for")


def _recipe(path: Path, name: str, root: Path | None) -> Source:
    """Return a source of a recipe, without negatives that were mined earlier."""
    from visavis.data.formats import open_source
    from visavis.registry import lookup
    from visavis.train.recipe import StepsStage, read_recipe

    recipe = read_recipe(path)
    parts = [stage.contrastive for stage in recipe.stages if isinstance(stage, StepsStage)]
    names = list(dict.fromkeys(name for part in parts if part for name in part.sources))
    if not name and len(names) != 1:
        raise InputError(
            f"{path} has {len(names)} sources for contrast ({', '.join(names) or 'none'}); name "
            "one with --source"
        )
    spec = lookup("source", name or names[0], recipe.data)
    bare = spec.model_copy(update={"negatives": ""})
    return open_source(bare, root or Path("data"), name=name or names[0])


def _file(path: Path, form: str, images: Path | None) -> Source:
    """Return the samples of a file or folder."""
    from visavis.data.check import guess_format
    from visavis.data.formats import FORMATS, open_source
    from visavis.registry import lookup
    from visavis.train.recipe import SourceRecipe

    form = form or guess_format(path)
    lookup("data format", form, FORMATS)
    where = path.absolute()
    folder = "" if images is None else str(images.absolute())
    spec: Any = {"format": form, "path": str(where), "images": folder}
    if not where.exists():  # the name of a data set, or of what is drawn
        spec["path"] = str(path)
    return open_source(SourceRecipe(**spec), where.parent, name=path.name)


def _identity(loaded: Model, precision: str) -> str:
    """Return the name of a folder of vectors that only this model, computing so, has made."""
    from visavis.checkpoints.loaded import auto_dtype

    dtype = str(auto_dtype(precision, loaded.device.type)).removeprefix("torch.")
    return f"{loaded.fingerprint}-{dtype}"


def _write_labels(folder: Path, samples: Source, loaded: Model, vocabulary: Path | None) -> Labels:
    from visavis.data.scene_graph import relation, write_labels
    from visavis.data.scene_graph import vocabulary as words

    if samples.spec.format != "scene-graph":
        raise InputError(
            f"--label-files are of scene graphs, and the data's format is {samples.spec.format!r}"
        )
    predicates: tuple[str, ...] = ()
    if vocabulary is not None:
        try:
            predicates = words(vocabulary.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read --vocabulary {vocabulary}: {error}") from error
    rows = (samples.rows[number] for number in range(len(samples)))
    return write_labels(folder, map(relation, rows), loaded.embed, predicates=predicates)
