"""Predicate classification on scene graphs: recall and mean recall at 50 and 100.

    python -m visavis.evaluate.scene_graph out/model recipes/tiny-scene-graph.yaml test --data DATA

Every ordered pair of an image's things is asked about, and each predicate scored for it; of all
(pair, predicate) of an image the k best are looked at, several predicates of one pair included.

    R@k     the share of an image's relations among them, the mean over images
    mR@k    the share of a predicate's relations, of all images together, the mean over predicates

"no relation" is left out before ranking. Equal scores keep the order of pairs and predicates.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from visavis.api import Model, load
from visavis.data.formats.scene_graph import Predicates, graphs
from visavis.data.scene_graph import NO_RELATION, STATEMENT
from visavis.data.sources import Source, open_data_source
from visavis.errors import InputError, VisavisError
from visavis.processing.images import image_size
from visavis.train.recipe import read_recipe
from visavis.utils import lookup

RANKS = (50, 100)
# The 15 of VG150's 50 predicates that open-vocabulary models see first when they are tested.
VG150_NOVEL = frozenset(
    {"across", "along", "and", "eating", "flying in", "growing on", "laying on", "lying on"}
    | {"mounted on", "on back of", "painted on", "part of", "says", "using", "walking in"}
)

Scored: TypeAlias = tuple[np.ndarray, Collection[tuple[int, int]]]  # [P, C], (pair, predicate)s


def recall(
    pictures: Iterable[Scored],
    predicates: Sequence[str],
    *,
    ranks: Sequence[int] = RANKS,
    novel: Collection[str] = (),
) -> dict[str, float]:
    """Return R@k and mR@k, and both for base and novel predicates alone where some are novel.

    Args:
        images: of each the scores [P, C] of its pairs and predicates, and which are true.
        predicates: names of the C columns.
        novel: predicates that were not trained on.
    """
    names = list(predicates)
    kinds = {"": set(names) - {NO_RELATION}}
    if novel:
        kinds |= {" base": kinds[""] - set(novel), " novel": kinds[""] & set(novel)}
    hits = {k: np.zeros(len(names)) for k in ranks}
    shares: dict[str, list[float]] = {f"R@{k}{kind}": [] for k in ranks for kind in kinds}
    totals = np.zeros(len(names))
    for scores, true in pictures:
        true = {(pair, column) for pair, column in true if names[column] != NO_RELATION}
        kept = [column for column, name in enumerate(names) if name != NO_RELATION]
        order = np.argsort(-scores[:, kept], axis=None, kind="stable")
        ranked = [(int(i) // len(kept), kept[int(i) % len(kept)]) for i in order[: max(ranks)]]
        for _, column in true:
            totals[column] += 1
        for k in ranks:
            found = true & set(ranked[:k])
            for _, column in found:
                hits[k][column] += 1
            for kind, members in kinds.items():
                own = sum(names[column] in members for _, column in true)
                right = sum(names[column] in members for _, column in found)
                if own:
                    shares[f"R@{k}{kind}"].append(right / own)
    result = {}
    for k in ranks:
        for kind, members in kinds.items():
            columns = [c for c, name in enumerate(names) if name in members and totals[c]]
            each = shares[f"R@{k}{kind}"]
            result[f"R@{k}{kind}"] = _mean(each)
            result[f"mR@{k}{kind}"] = _mean([hits[k][c] / totals[c] for c in columns])
    return result


def scene_graph(
    model: Model,
    source: Source,
    *,
    predicates: Sequence[str] = (),
    ranks: Sequence[int] = RANKS,
    novel: Collection[str] = (),
) -> dict[str, float]:
    """Return a model's recall on a source of the format `scene-graph`.

    Args:
        predicates: the vocabulary; empty: the predicates of the source, sorted.

    Raises:
        InputError: the source is of another format.
    """
    if not isinstance(source.make, Predicates):
        raise InputError(f"{source.name!r} is no source of the format scene-graph")
    make, spec = source.make, source.spec
    found = graphs((source.rows[i] for i in range(len(source))), make)
    said = sorted({one.predicate for graph in found for one in graph.relations})
    names = list(predicates or said)
    missing = sorted(set(said) - set(names))
    if missing:
        raise InputError(f"the predicate {missing[0]!r} is not in the vocabulary; complete it")
    statements = model.embed(
        [STATEMENT.format(name) for name in names], instruction=spec.target_instruction or None
    )
    scored: list[Scored] = []
    for graph in found:
        size = image_size(graph.picture)
        pairs = [(s, o) for s in graph.things for o in graph.things if s.box != o.box]
        asked = [make.query(graph.picture, size, subject, object) for subject, object in pairs]
        queries = model.embed(asked, instruction=spec.instruction or None)
        numbers = {pair: number for number, pair in enumerate(pairs)}
        true = {
            (numbers[one.subject, one.object], names.index(one.predicate))
            for one in graph.relations
            if (one.subject, one.object) in numbers
        }
        scored.append((queries @ statements.T, true))
    return {
        "pictures": len(found),
        "predicates": len(names),
        **{
            key: round(value, 4)
            for key, value in recall(scored, names, ranks=ranks, novel=novel).items()
        },
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a model's scores on a source of a recipe."""
    parser = argparse.ArgumentParser(prog="python -m visavis.evaluate.scene_graph")
    parser.add_argument("model")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("source", help="a source of the recipe, by name")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets")
    parser.add_argument("--vg150", action="store_true", help="split VG150's base and novel ones")
    options = parser.parse_args(arguments)
    try:
        recipe = read_recipe(options.recipe)
        spec = lookup("source", options.source, recipe.data)
        source = open_data_source(spec, options.data, name=options.source)
        novel = VG150_NOVEL if options.vg150 else ()
        scores = scene_graph(load(options.model), source, novel=novel)
    except VisavisError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(scores, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
