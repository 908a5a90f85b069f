"""`visavis data`: look at training data before training on it. The looking is in `data.check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visavis.cli.common import (
    JsonOption,
    Loading,
    ModelArgument,
    loads_a_model,
    print_columns,
    print_json,
    say,
    show_progress,
)
from visavis.errors import InputError

if TYPE_CHECKING:
    from visavis.api import Model
    from visavis.data.check import CheckedSource, Findings
    from visavis.data.scene_graph import Labels
    from visavis.data.sources import Source


EXIT_FAULTY = 1
MAX_LISTED = 5  # of each kind of problem of a source; --json lists all
BAR = 40
data = typer.Typer(name="data", no_args_is_help=True, help="Look at training data.")

DataOption = Annotated[Path, typer.Option("--data", help="The folder of data sets.")]


@data.callback()
def about() -> None:
    """Look at training data before training on it."""


@data.command()
def check(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE|FILE…",
            help="A recipe (.yaml), or data: a file, a folder, a set's name.",
        ),
    ],
    root: DataOption = Path("data"),
    test: Annotated[
        list[str],
        typer.Option("--test", help="A recipe or data that is held out; may be repeated."),
    ] = [],  # noqa: B006 - typer copies it
    images: Annotated[
        Path | None, typer.Option("--images", help="Where pictures' paths start, of a FILE.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check training data: every record, every picture, lengths, duplicates.

    Of a recipe, tokens are counted as its model counts them, and sources that no stage reads are
    taken as held out. Exit status 0 if all of it can be trained on, 1 if not, 2 on an error.

    [bold]Examples[/bold]

      visavis data check recipes/tiny-llava.yaml --data DATA

      visavis data check train.jsonl --images pictures --test heldout.jsonl --json
    """
    from visavis.data import check as checking
    from visavis.utils import track

    entries = [entry for name in sources for entry in _entries(name, root, images, False)]
    entries += [entry for name in test for entry in _entries(name, root, images, True)]

    def tracked(numbers: range, name: str) -> Iterator[int]:
        return track(numbers, name, weights=[1] * len(numbers), show=show_progress())

    found = checking.check(entries, track=tracked)
    if as_json:
        print_json([_facts(one) for one in found])
    else:
        for one in found:
            _show(one)
        _show_sum(found)
    if any(one.problems for one in found):
        raise typer.Exit(EXIT_FAULTY)


def _entries(name: str, root: Path, images: Path | None, test: bool) -> Iterator[CheckedSource]:
    """Yield what a word of the command line stands for."""
    from visavis.data.check import CheckedSource, guess_format
    from visavis.data.sources import SourceConfig

    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        yield from _recipe_entries(path, root, test)
        return
    kind = guess_format(path)
    folder = "" if images is None else str(images.absolute())
    where = name if kind == "records" else str(path.absolute())
    spec = SourceConfig(format=kind, path=where, images=folder)
    yield CheckedSource(name, spec, root, test)


def _recipe_entries(path: Path, root: Path, test: bool) -> Iterator[CheckedSource]:
    from visavis.data.check import CheckedSource
    from visavis.errors import VisavisError
    from visavis.train.recipe import StepsStage, read_recipe, sources_of
    from visavis.train.runner import open_model

    recipe = read_recipe(path)
    encoder = None
    try:
        model = open_model(recipe.model, precision="auto", device="cpu", seed=recipe.seed)
        encoder = model.encoder
    except VisavisError as error:
        say(f"tokens are estimated, because the recipe's model cannot be loaded: {error}")
    trained = {name for stage in recipe.stages for name in sources_of(stage)}
    limits: dict[str, int] = {}
    for stage in recipe.stages:
        if not isinstance(stage, StepsStage):
            continue
        for part in (stage.generative, stage.contrastive):
            if part is not None and part.max_tokens is not None:
                for source in part.sources:
                    limits[source] = min(part.max_tokens, limits.get(source, part.max_tokens))
    for name, spec in recipe.data.items():
        held_out = test or name not in trained
        yield CheckedSource(name, spec, root, held_out, encoder, limits.get(name))


# ---- what is printed -----------------------------------------------------------------------------


def _facts(one: Findings) -> dict[str, Any]:
    return {
        "source": one.entry.name,
        "format": one.entry.spec.format,
        "test": one.entry.test,
        "samples": one.samples,
        "pictures": one.pictures,
        "videos": one.videos,
        "negatives": one.negatives,
        "tokens": {
            "estimated": one.entry.encoder is None,
            "sequences": len(one.lengths),
            "median": one.quantile(0.5),
            "p95": one.quantile(0.95),
            "max": one.quantile(1.0),
            "histogram": [{"below": edge, "sequences": count} for edge, count in one.histogram()],
        },
        "problems": [
            {"kind": problem.kind, "id": problem.id, "text": problem.text}
            for problem in one.problems
        ],
        "copies": [{"id": id, "of": first} for id, first in one.copies],
        "repeated_ids": one.repeated_ids,
        "seen_pictures": [{"id": id, "in": first} for id, first in one.seen_pictures],
        "unused_negatives": one.unused,
    }


def _show(one: Findings) -> None:
    from visavis.data.check import ERRORS

    role = "held out" if one.entry.test else "trained on"
    typer.secho(f"{one.entry.name} ({one.entry.spec.format}, {role})", bold=True)
    counts = {
        "samples": one.samples,
        "pictures": one.pictures,
        "videos": one.videos,
        "negatives": one.negatives,
    }
    typer.echo("  " + ", ".join(f"{count:,} {name}" for name, count in counts.items() if count))
    if one.lengths:
        how = "estimated of texts, without pictures" if one.entry.encoder is None else "exact"
        typer.echo(
            f"  tokens ({how}): median {one.quantile(0.5):,}, 95 % up to {one.quantile(0.95):,}, "
            f"longest {one.quantile(1.0):,}"
        )
        _show_bars(one.histogram())
    kinds = Counter(problem.kind for problem in one.problems)
    for kind, count in kinds.items():
        typer.secho(f"  {count:,} × {ERRORS[kind]}", fg="red")
        told = [problem for problem in one.problems if problem.kind == kind][:MAX_LISTED]
        for problem in told:
            typer.echo(f"    {problem.id}: {' '.join(problem.text.split())}")
        _show_rest(count)
    for title, pairs in (
        ("samples are the same as an earlier one", one.copies),
        ("samples show a picture that is trained on", one.seen_pictures),
    ):
        if pairs:
            typer.secho(f"  {len(pairs):,} {title}", fg="yellow")
            for id, first in pairs[:MAX_LISTED]:
                typer.echo(f"    {id}: {first}")
            _show_rest(len(pairs))
    if one.repeated_ids:
        listed = ", ".join(one.repeated_ids[:MAX_LISTED])
        typer.secho(f"  {len(one.repeated_ids):,} ids occur again: {listed}", fg="yellow")
    if one.unused:
        typer.secho(f"  {one.unused:,} mined negatives are of no record here", fg="yellow")


def _show_bars(histogram: list[tuple[int, int]]) -> None:
    most = max(count for _, count in histogram)
    rows = [
        (f"  < {edge:,}", "█" * max(1, round(BAR * count / most)) + f" {count:,}")
        for edge, count in histogram
    ]
    print_columns(rows)


def _show_rest(count: int) -> None:
    if count > MAX_LISTED:
        typer.echo(f"    … and {count - MAX_LISTED:,} more (--json lists all)")


def _show_sum(found: list[Findings]) -> None:
    problems = sum(len(one.problems) for one in found)
    samples = sum(one.samples for one in found if not one.entry.test)
    if problems:
        typer.secho(f"{problems:,} problems; training would stop or mislead", fg="red", bold=True)
    else:
        typer.secho(f"{samples:,} samples can be trained on", fg="green", bold=True)


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
    relative_margin: Annotated[
        str,
        typer.Option(
            metavar="FLOAT",
            help="Minimum margin below the positive score, as a share of it ('none': any).",
        ),
    ] = "0.05",
    absolute_margin: Annotated[
        float | None, typer.Option(help="Minimum absolute margin below the positive score.")
    ] = None,
    max_score: Annotated[float | None, typer.Option(help="Maximum score of a negative.")] = None,
    min_score: Annotated[float | None, typer.Option(help="Minimum score of a negative.")] = None,
    range_min: Annotated[int, typer.Option(help="Skip this many of the nearest items.")] = 0,
    range_max: Annotated[int, typer.Option(help="Consider this many of the nearest items.")] = 100,
    sampling_strategy: Annotated[
        str, typer.Option(metavar="top|random", help="Take the nearest, or draw at random.")
    ] = "top",
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    use_faiss: Annotated[bool, typer.Option("--use-faiss", help="Search with FAISS.")] = False,
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

      visavis mine nano pairs.jsonl -o negatives.jsonl --nearest 4 --range-min 10 --range-max 50
      --sampling-strategy random

      visavis mine nano recipes/my.yaml --source coco --data DATA -o DATA/coco/negatives.jsonl

      visavis mine nano vg150.json --images VG -o negatives.jsonl --nearest 0 --labels 8
      --same-image 4 --total 12 --label-files labels
    """
    from visavis.data.corpus import Corpus
    from visavis.data.embedding_store import EmbeddingStore
    from visavis.data.hard_negatives import Mining, MiningReport
    from visavis.data.hard_negatives import mine as mined
    from visavis.data.mined_negatives import read_corpus, write_mined

    settings = Mining(
        nearest=nearest,
        labels=labels,
        same_image=same_image,
        total=total,
        relative_margin=_margin(relative_margin),
        absolute_margin=absolute_margin,
        max_score=max_score,
        min_score=min_score,
        range_min=range_min,
        range_max=range_max,
        sampling_strategy=sampling_strategy,  # type: ignore[arg-type]  # Mining checks it
        seed=seed,
        use_faiss=use_faiss,
    )
    if out.is_dir():
        raise InputError(f"--out {out} is a folder, expected the name of a file for JSON lines")
    samples = _recipe(data, source, root) if data.suffix in (".yaml", ".yml") else None
    samples = samples or _file(data, form, images)
    others = read_corpus(corpus) if corpus is not None else []

    loaded = loading.load(model)
    kept = cache if cache is not None else out.with_name(f"{out.stem}-vectors")
    catalogue = Corpus(samples, others, progress=show_progress())
    report = MiningReport()
    with EmbeddingStore(kept / _identity(loaded, loading.precision), loaded.embedding_dim) as store:
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


def _margin(text: str) -> float | None:
    """Return the value of --relative-margin."""
    try:
        return None if text.lower() == "none" else float(text)
    except ValueError:
        raise InputError(f"--relative-margin is {text!r}, expected a number or 'none'") from None


def _recipe(path: Path, name: str, root: Path | None) -> Source:
    """Return a source of a recipe, without negatives that were mined earlier."""
    from visavis.data.sources import open_data_source
    from visavis.train.recipe import StepsStage, read_recipe
    from visavis.utils import lookup

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
    return open_data_source(bare, root or Path("data"), name=name or names[0])


def _file(path: Path, form: str, images: Path | None) -> Source:
    """Return the samples of a file or folder."""
    from visavis.data.check import guess_format
    from visavis.data.formats import FORMATS
    from visavis.data.sources import SourceConfig, open_data_source
    from visavis.utils import lookup

    form = form or guess_format(path)
    lookup("data format", form, FORMATS)
    where = path.absolute()
    folder = "" if images is None else str(images.absolute())
    spec: Any = {"format": form, "path": str(where), "images": folder}
    if not where.exists():  # the name of a data set, or of what is drawn
        spec["path"] = str(path)
    return open_data_source(SourceConfig(**spec), where.parent, name=path.name)


def _identity(loaded: Model, precision: str) -> str:
    """Return the name of a folder of vectors that only this model, computing so, has made."""
    from visavis.checkpoints.checkpoint import auto_dtype

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
