"""`visavis mine`: mine hard negatives for contrastive training."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visavis.cli.common import (
    JsonOption,
    Loading,
    ModelArgument,
    loads_a_model,
    print_json,
    say,
    show_progress,
)
from visavis.cli.data import SOURCE
from visavis.errors import InputError

if TYPE_CHECKING:
    from visavis.api import Model
    from visavis.data.scene_graph import Labels
    from visavis.data.sources import Source

SHOWN = 5  # skipped items that are printed
NEGATIVES = "Negatives"


class Strategy(StrEnum):
    """How negatives are chosen among the candidates."""

    TOP = "top"
    RANDOM = "random"


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
    sampling_strategy: Annotated[
        Strategy,
        typer.Option(
            metavar="top|random",
            help="Take the nearest candidates, or sample at random.",
            rich_help_panel=NEGATIVES,
        ),
    ] = Strategy.TOP,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Random seed.", rich_help_panel=NEGATIVES)
    ] = 0,
    use_faiss: Annotated[
        bool, typer.Option("--use-faiss", help="Nearest-neighbour search with FAISS.")
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

      visavis mine nano pairs.jsonl -o negatives.jsonl --range-min 10 --range-max 50

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
        relative_margin=relative_margin,
        absolute_margin=absolute_margin,
        max_score=max_score,
        min_score=min_score,
        range_min=range_min,
        range_max=range_max,
        sampling_strategy=sampling_strategy.value,
        seed=seed,
        use_faiss=use_faiss,
    )
    if os.path.isdir(out):
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
    """Open a data file or folder."""
    from visavis.data.check import guess_format
    from visavis.data.formats import FORMATS
    from visavis.data.sources import SourceConfig, open_data_source
    from visavis.utils import lookup

    form = form or guess_format(path)
    lookup("data format", form, FORMATS)
    where = path.absolute()
    folder = "" if images is None else str(images.absolute())
    spec: Any = {"format": form, "path": str(where), "images": folder}
    if not os.path.exists(where):  # the name of a data set, or of what is drawn
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
