"""`visavis data` and `visavis mine`: validate training data, mine hard negatives."""

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
    from visavis.data.formats import Source
    from visavis.data.scene_graph import Labels


EXIT_FAULTY = 1
MAX_LISTED = 5  # of each kind of problem of a source; --json lists all
BAR = 40
data = typer.Typer(name="data", no_args_is_help=True, help="Validate training data.")

DataOption = Annotated[
    Path, typer.Option("--data", metavar="DIR", help="Root folder of data sets.")
]
SOURCE = "RECIPE|FILE"


@data.callback()
def about() -> None:
    """Validate training data."""


@data.command()
def check(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar=SOURCE,
            help="Recipe (.yaml), data file, data folder or data set name.",
        ),
    ],
    root: DataOption = Path("data"),
    test: Annotated[
        list[str],
        typer.Option("--test", metavar=SOURCE, help="Held-out recipe or data; repeatable."),
    ] = [],  # noqa: B006 - typer copies it
    images: Annotated[
        Path | None,
        typer.Option("--images", metavar="DIR", help="Base folder of image paths in a data file."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Validate training data: records, images, sequence lengths, duplicates, leaks.

    For a recipe, tokens are counted with its model, and sources that no stage reads are held out.
    Exit code 0 if all data is valid, 1 if not, 2 on an error.

    [bold]Examples[/bold]

      visavis data check recipes/tiny-llava.yaml --data DATA

      visavis data check train.jsonl --images images/ --test heldout.jsonl --json
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
        _show_total(found)
    if any(one.problems for one in found):
        raise typer.Exit(EXIT_FAULTY)


def _entries(name: str, root: Path, images: Path | None, test: bool) -> Iterator[CheckedSource]:
    """Yield the sources that one command-line argument names."""
    from visavis.data.check import CheckedSource, guess_format
    from visavis.train.recipe import SourceConfig

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


# ---- output --------------------------------------------------------------------------------------


def _facts(one: Findings) -> dict[str, Any]:
    return {
        "source": one.entry.name,
        "format": one.entry.spec.format,
        "test": one.entry.test,
        "samples": one.samples,
        "images": one.pictures,
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
        "duplicates": [{"id": id, "of": first} for id, first in one.copies],
        "repeated_ids": one.repeated_ids,
        "leaked_images": [{"id": id, "in": first} for id, first in one.seen_pictures],
        "unused_negatives": one.unused,
    }


def _show(one: Findings) -> None:
    from visavis.data.check import ERRORS

    role = "held out" if one.entry.test else "trained on"
    typer.secho(f"{one.entry.name} ({one.entry.spec.format}, {role})", bold=True)
    counts = {
        "samples": one.samples,
        "images": one.pictures,
        "videos": one.videos,
        "negatives": one.negatives,
    }
    typer.echo("  " + ", ".join(f"{count:,} {name}" for name, count in counts.items() if count))
    if one.lengths:
        how = "estimated from texts, without images" if one.entry.encoder is None else "exact"
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
        ("samples duplicate an earlier one", one.copies),
        ("samples contain an image of the training data", one.seen_pictures),
    ):
        if pairs:
            typer.secho(f"  {len(pairs):,} {title}", fg="yellow")
            for id, first in pairs[:MAX_LISTED]:
                typer.echo(f"    {id}: {first}")
            _show_rest(len(pairs))
    if one.repeated_ids:
        listed = ", ".join(one.repeated_ids[:MAX_LISTED])
        typer.secho(f"  {len(one.repeated_ids):,} repeated ids: {listed}", fg="yellow")
    if one.unused:
        typer.secho(f"  {one.unused:,} mined negatives have no record here", fg="yellow")


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


def _show_total(found: list[Findings]) -> None:
    problems = sum(len(one.problems) for one in found)
    samples = sum(one.samples for one in found if not one.entry.test)
    if problems:
        typer.secho(f"{problems:,} problems; fix them before training", fg="red", bold=True)
    else:
        typer.secho(f"{samples:,} valid training samples", fg="green", bold=True)


SHOWN = 5  # skipped items that are printed
NEGATIVES = "Negatives"


def _float_or_none(text: str | float) -> float | None:
    return None if text == "none" else float(text)


@loads_a_model
def mine(
    model: ModelArgument,
    data: Annotated[
        Path,
        typer.Argument(metavar=SOURCE, help="Training data, or a recipe (see --source)."),
    ],
    out: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="JSON lines file {id, negatives}."),
    ],
    source: Annotated[
        str, typer.Option(metavar="NAME", help="Data source of the recipe to mine.")
    ] = "",
    root: Annotated[
        Path | None, typer.Option("--data", metavar="DIR", help="Root folder of data sets.")
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            "--format", metavar="NAME", help="Data format. Default: detected from the first record."
        ),
    ] = "",
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Base folder of image paths in a data file.")
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="More candidates: JSON lines {text, image, video}."),
    ] = None,
    nearest: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Negatives per sample nearest to the query.",
            rich_help_panel=NEGATIVES,
        ),
    ] = 8,
    labels: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Negatives per sample whose text is nearest to the positive text.",
            rich_help_panel=NEGATIVES,
        ),
    ] = 0,
    same_image: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Negatives per sample from other texts of the same image.",
            rich_help_panel=NEGATIVES,
        ),
    ] = 0,
    total: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Fill up to N negatives per sample with random ones.",
            rich_help_panel=NEGATIVES,
        ),
    ] = 0,
    relative_margin: Annotated[
        float | None,
        typer.Option(
            metavar="FLOAT|none",
            parser=_float_or_none,
            help="Minimum margin below the positive score, as a fraction of it.",
            rich_help_panel=NEGATIVES,
        ),
    ] = 0.05,
    absolute_margin: Annotated[
        float | None,
        typer.Option(
            metavar="FLOAT",
            help="Minimum absolute margin below the positive score.",
            rich_help_panel=NEGATIVES,
        ),
    ] = None,
    max_score: Annotated[
        float | None,
        typer.Option(
            metavar="FLOAT", help="Maximum score of a negative.", rich_help_panel=NEGATIVES
        ),
    ] = None,
    min_score: Annotated[
        float | None,
        typer.Option(
            metavar="FLOAT", help="Minimum score of a negative.", rich_help_panel=NEGATIVES
        ),
    ] = None,
    range_min: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Skip the N highest-ranked candidates.",
            rich_help_panel=NEGATIVES,
        ),
    ] = 0,
    range_max: Annotated[
        int,
        typer.Option(metavar="N", help="Lowest rank of a candidate.", rich_help_panel=NEGATIVES),
    ] = 100,
    sample: Annotated[
        bool,
        typer.Option(
            "--sample",
            help="Sample candidates at random instead of taking the nearest first.",
            rich_help_panel=NEGATIVES,
        ),
    ] = False,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Random seed.", rich_help_panel=NEGATIVES)
    ] = 0,
    faiss: Annotated[
        bool, typer.Option("--faiss", help="Nearest-neighbour search with FAISS.")
    ] = False,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Embedding cache. Default: a folder beside OUTPUT."),
    ] = None,
    label_files: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Scene graphs: folder for the three files of label embeddings."
        ),
    ] = None,
    vocabulary: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Scene graphs: comma-separated list of predicates."),
    ] = None,
    as_json: JsonOption = False,
    *,
    loading: Loading,
) -> None:
    """Mine hard negatives for contrastive training, from texts, images and videos.

    A recipe reads OUTPUT as the `negatives` of a source. Embeddings are cached: safe to interrupt,
    rerun the same command to resume.

    [bold]Examples[/bold]

      visavis mine nano pairs.jsonl -o negatives.jsonl

      visavis mine nano pairs.jsonl -o negatives.jsonl --range-min 10 --range-max 50 --sample

      visavis mine nano recipes/my.yaml --source coco --data DATA -o negatives.jsonl

      visavis mine nano vg150.json --images VG -o negatives.jsonl --labels 8 --same-image 4
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
        ratio=None if relative_margin is None else 1 - relative_margin,
        margin=absolute_margin,
        max_score=max_score,
        min_score=min_score,
        skip=range_min,
        depth=range_max,
        sample=sample,
        seed=seed,
        faiss=faiss,
    )
    if out.is_dir():
        raise InputError(f"--output {out} is a folder, expected a path for a JSON lines file")
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
        say(f"skipped: {name}: {reason}")
    if len(report.left_out) > SHOWN:
        say(f"{len(report.left_out) - SHOWN} more are skipped; --json lists all")
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
        f"{report.embedded} embeddings computed, {report.reused} from the cache"
    )
    if report.short:
        say(f"{report.short} samples have fewer negatives than asked for")


def _recipe(path: Path, name: str, root: Path | None) -> Source:
    """Open a data source of a recipe, without negatives that were mined earlier."""
    from visavis.data.formats import open_data_source
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
    """Open a data file or folder."""
    from visavis.data.check import guess_format
    from visavis.data.formats import FORMATS, open_data_source
    from visavis.train.recipe import SourceConfig
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
    """Return a cache key: the checkpoint fingerprint and the compute data type."""
    from visavis.checkpoints.checkpoint import auto_dtype

    dtype = str(auto_dtype(precision, loaded.device.type)).removeprefix("torch.")
    return f"{loaded.fingerprint}-{dtype}"


def _write_labels(folder: Path, samples: Source, loaded: Model, vocabulary: Path | None) -> Labels:
    from visavis.data.scene_graph import relation, write_labels
    from visavis.data.scene_graph import vocabulary as words

    if samples.spec.format != "scene-graph":
        raise InputError(
            f"--label-files needs data of format 'scene-graph', got {samples.spec.format!r}"
        )
    predicates: tuple[str, ...] = ()
    if vocabulary is not None:
        try:
            predicates = words(vocabulary.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read --vocabulary {vocabulary}: {error}") from error
    rows = (samples.rows[number] for number in range(len(samples)))
    return write_labels(folder, map(relation, rows), loaded.embed, predicates=predicates)
