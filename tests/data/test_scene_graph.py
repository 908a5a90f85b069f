"""Scene graphs: rows as samples, label files, and recall by hand and by another derivation."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as pil
from tokenizers import AddedToken

from tests.conftest import REPOSITORY
from tests.data.data_files import matches, opened, spec
from tests.fakes import byte_tokenizer
from visavis import load
from visavis.data.formats import synthetic
from visavis.data.scene_graph import (
    STATEMENT,
    Thing,
    other_pairs,
    question,
    read_labels,
    relation,
    scaled,
    vocabulary,
    write_labels,
)
from visavis.data.sources import open_data_source, source_fingerprint
from visavis.errors import InputError, TrainError
from visavis.evaluate.scene_graph import VG150_NOVEL, recall, scene_graph
from visavis.inputs import Prompt
from visavis.processing.chat_template import encode_plain
from visavis.processing.tokenizer import SpecialTokens
from visavis.train.recipe import read_recipe
from visavis.train.runner import run_recipe

CUP, TABLE, LAMP = [10, 20, 60, 80], [0, 50, 200, 100], [150, 0, 180, 50]


def row(id: Any, predicate: str, subject: list[Any], object: list[Any], **more: Any) -> dict:
    names = {str(CUP): "cup", str(TABLE): "table", str(LAMP): "lamp"}
    things = [{"bbox": box, "class_name": names.get(str(box), "?")} for box in (subject, object)]
    return {"id": id, "image_id": 1, "image": "a.png", "predicate": predicate,
            "subject": things[0], "object": things[1], **more}  # fmt: skip


ROWS = [
    row(0, "on", CUP, TABLE),
    row(1, "over", CUP, TABLE),  # true for the same pair
    row(2, "under", TABLE, CUP),
    row(3, "near", LAMP, TABLE),
    row(4, "on", LAMP, TABLE),
    row(5, "behind", LAMP, CUP),
    row(6, "wearing", CUP, LAMP, image_id=2),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pil.new("RGB", (200, 100), "white").save(tmp_path / "a.png")
    (tmp_path / "graph.json").write_text(json.dumps(ROWS))
    return tmp_path


def embed(texts: list[str]) -> np.ndarray:
    """Vectors on a circle, in the order of the alphabet."""
    angles = [ord(text.removeprefix("The subject is ")[0]) / 10 for text in texts]
    return np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)


def said(samples: Any) -> list[list[str]]:
    prefix, suffix = STATEMENT.split("{}")
    return [
        [n.text.removeprefix(prefix).removesuffix(suffix) for n in one.negatives] for one in samples
    ]


# ---- rows ----------------------------------------------------------------------------------------


def test_a_row_is_a_question_about_a_picture(folder: Path) -> None:
    first = matches(opened(folder, "scene-graph", "graph.json"))[0]
    assert [image.source for image in first.query.visuals] == [folder / "a.png"]
    assert first.query.text == (
        "In the given image, the subject <|object_ref_start|>cup<|object_ref_end|> is located at "
        "<|box_start|>(50, 200), (300, 800)<|box_end|>, the object <|object_ref_start|>table"
        "<|object_ref_end|> is located at <|box_start|>(0, 500), (999, 999)<|box_end|>. Please "
        "return the predicate relationship between the subject and the object."
    )
    assert first.target.text == "The subject is on the object." and first.negatives == ()
    options = {"marks": False, "question": "{subject}, {object}: {object_box}?"}
    plain = matches(opened(folder, "scene-graph", "graph.json", options=options))
    assert plain[2].query.text == "table, cup: (50, 200), (300, 800)?"
    groups = [one.group for one in plain]  # two predicates of one pair are no negatives
    assert groups[0] == groups[1] and groups[3] == groups[4] and len(set(groups)) == 5


def test_boxes_are_at_least_one_wide() -> None:
    assert scaled((64, 0, 640, 480), (640, 480)) == (100, 0, 999, 999)
    assert scaled((60, 80, 10, 20), (100, 100)) == (100, 200, 600, 800)  # ends the wrong way round
    assert scaled((50, 50, 50, 50), (100, 100)) == (500, 500, 501, 501)
    assert scaled((300, -5, 300, -2), (100, 100)) == (999, 0, 999, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"predicate": ""}, "it has no 'predicate'"),
        ({"subject": {"class_name": "cup", "bbox": [1, 2, 3]}}, "its subject is .* box in pixels"),
        ({"object": {"class_name": "cup", "bbox": [1, 2, 3, "x"]}}, "its object is"),
        ({"object": {"bbox": CUP}}, "its object has no 'class_name'"),
        ({"image": "b.png"}, "b.png.* does not exist"),
        ({"image": None}, "its picture is None"),
    ],
)
def test_what_is_wrong_is_said(folder: Path, fields: dict[str, Any], message: str) -> None:
    (folder / "graph.json").write_text(json.dumps([ROWS[0], {**ROWS[1], **fields}]))
    source = opened(folder, "scene-graph", "graph.json")
    with pytest.raises(TrainError, match=f"the record '1' .*{message}"):
        source[1]


# ---- label files ---------------------------------------------------------------------------------


def test_label_files(folder: Path) -> None:
    relations = [relation({**one, "id": str(one["id"])}) for one in ROWS]
    write_labels(folder / "labels", relations, embed, num_neighbors=2)
    known = ["behind", "near", "on", "over", "under", "wearing"]
    files = {
        path.stem: json.loads(path.read_text()) for path in sorted((folder / "labels").iterdir())
    }
    assert files["predicate_vocab"] == {
        "predicates": known,
        "vocab_size": 6,
        "predicate_to_idx": {name: i for i, name in enumerate(known)},
        "idx_to_predicate": {str(i): name for i, name in enumerate(known)},
    }
    assert files["predicate_neighbors"]["under"]["neighbors"] == ["wearing", "on"]
    np.testing.assert_allclose(
        files["predicate_neighbors"]["under"]["scores"], np.cos([0.2, 0.6]), atol=1e-5
    )
    assert files["same_image_negatives"] == {
        "0": ["under", "near", "behind"],
        "1": ["under", "near", "behind"],
        "2": ["on", "over", "near", "behind"],
        "3": ["over", "under", "behind"],  # "on" is true for the lamp too
        "4": ["over", "under", "behind"],
        "5": ["on", "over", "under", "near"],
        "6": [],
    }
    few = vocabulary("behind, near,on, under , on\n,wearing, says")
    assert few == ("behind", "near", "on", "under", "wearing", "says")
    with pytest.raises(TrainError, match="1 of the 6 predicates .* the first is 'over'"):
        write_labels(folder, relations, embed, predicates=few)
    with pytest.raises(TrainError, match="14 samples have 7 different ids"):
        write_labels(folder, relations * 2, embed)


def test_negatives_are_near_then_of_the_picture_then_random(folder: Path) -> None:
    relations = [relation({**one, "id": str(one["id"])}) for one in ROWS]
    words = ("at", "from", "says", "with")
    known = tuple(sorted({*words, *(one.predicate for one in relations)}))
    write_labels(folder / "labels", relations, embed, predicates=known, num_neighbors=3)
    options = {"labels": "labels", "nearest": 2, "same_image": 2, "negatives": 6}
    source = opened(folder, "scene-graph", "graph.json", options=options)
    found = said(matches(source))
    true = [{"on", "over"}, {"on", "over"}, {"under"}, {"near", "on"}, {"near", "on"}]
    labels, others = read_labels(folder / "labels"), other_pairs(relations)
    for number, (negatives, own) in enumerate(zip(found, true, strict=False)):
        assert len(negatives) == len(set(negatives)) == 6 and not own & set(negatives)
        near = [p for p in labels.neighbors[relations[number].predicate] if p not in own][:2]
        assert negatives[: len(near)] == near
        assert set(negatives[2:4]) <= set(others[str(number)]) | set(known)
    assert found == said(matches(opened(folder, "scene-graph", "graph.json", options=options)))
    seeds = [said([opened(folder, "scene-graph", "graph.json",
                          options={**options, "seed": seed})[0]]) for seed in range(5)]  # fmt: skip
    assert len({str(one) for one in seeds}) > 1
    before = source_fingerprint(spec("scene-graph", "graph.json", options=options), folder)
    (folder / "labels/predicate_neighbors.json").write_text("{}")
    assert source_fingerprint(spec("scene-graph", "graph.json", options=options), folder) != before
    with pytest.raises(TrainError, match="do not fit each other"):
        opened(folder, "scene-graph", "graph.json", options=options)
    (folder / "labels/predicate_vocab.json").unlink()
    with pytest.raises(TrainError, match=r"cannot read .*predicate_vocab\.json.*visavis mine"):
        opened(folder, "scene-graph", "graph.json", options=options)


# ---- drawings ------------------------------------------------------------------------------------


def test_drawings_say_what_is_drawn(tmp_path: Path) -> None:
    source = opened(tmp_path, "scene-graph", "drawn/test", options={"marks": False})
    assert len(source) == 12 * 30
    rows = [source.rows[number] for number in range(60)]
    assert {one["predicate"] for one in rows} == set(synthetic.PREDICATES)
    opposite = dict(zip(synthetic.PREDICATES, ("right of", "left of", "below", "above", "around",
                                              "inside"), strict=True))  # fmt: skip
    said = {
        (r["subject"]["class_name"], r["object"]["class_name"]): r["predicate"] for r in rows[:30]
    }
    assert all(said[b, a] == opposite[predicate] for (a, b), predicate in said.items())
    assert said["egg", "tin"] == "inside"
    boxes = [r["subject"]["bbox"] for r in rows] + [r["object"]["bbox"] for r in rows]
    assert all(0 <= b[0] < b[2] < 100 and 0 <= b[1] < b[3] < 100 for b in boxes)
    assert source[3].id == "test-0/3" and len(source[0].query.visuals) == 1
    with pytest.raises(TrainError, match="expected one of drawn/train, drawn/test"):
        opened(tmp_path, "scene-graph", "drawn/val")


# ---- recall --------------------------------------------------------------------------------------


def test_recall_by_hand() -> None:
    names = ["no relation", "on", "near"]
    first = np.array([[9.0, 0.9, 0.1], [9.0, 0.8, 0.7]])  # ranked: 0 on, 1 on, 1 near, 0 near
    second = np.array([[0.0, 0.2, 0.3]])
    pictures = [(first, {(0, 1), (1, 2), (1, 0)}), (second, {(0, 1)})]
    scores = recall(pictures, names, ranks=(1, 3))
    assert scores == {"R@1": 0.25, "mR@1": 0.25, "R@3": 1.0, "mR@3": 1.0}
    split = recall(pictures, names, ranks=(1,), novel={"near"})
    assert (split["R@1 base"], split["mR@1 base"]) == (0.5, 0.5)  # (1 + 0) / 2 pictures; 1 of 2
    assert (split["R@1 novel"], split["mR@1 novel"]) == (0.0, 0.0)
    assert len(VG150_NOVEL) == 15


@pytest.mark.parametrize("seed", range(5))
def test_recall_by_another_derivation(seed: int) -> None:
    """Triplets of names in lists, sorted; sets of what was recalled; shares of those."""
    draw = np.random.default_rng(seed)
    names = [f"p{i}" for i in range(6)] + ["no relation"]
    pictures, everything = [], []
    for picture in range(7):
        scores = draw.normal(size=(int(draw.integers(1, 9)), 7))
        true = {(int(draw.integers(len(scores))), int(draw.integers(7))) for _ in range(6)}
        pictures.append((scores, true))
        ranked = [
            (-scores[pair, column], picture, pair, names[column])
            for pair in range(len(scores))
            for column in range(7)
            if names[column] != "no relation"
        ]
        top = {(one[2], one[3]) for one in sorted(ranked)[:10]}
        everything.append(({(pair, names[c]) for pair, c in true if c != 6}, top))
    shares = [len(true & top) / len(true) for true, top in everything if true]
    by_name = {
        name: [
            (pair, said) in top for true, top in everything for pair, said in true if said == name
        ]
        for name in names
    }
    means = [np.mean(hits) for hits in by_name.values() if hits]
    found = recall(pictures, names, ranks=(10,))
    np.testing.assert_allclose(found["R@10"], np.mean(shares))
    np.testing.assert_allclose(found["mR@10"], np.mean(means))


def test_a_model_that_knows_recalls_all(tmp_path: Path) -> None:
    """Vectors told by the drawings themselves: perfect; the same rotated: nothing."""

    class Knowing:
        def __init__(self, turn: int) -> None:
            self.turn = turn

        def embed(self, items: Any, **_: Any) -> np.ndarray:
            texts = [item if isinstance(item, str) else item.text for item in items]
            return np.stack([self.vector(text) for text in texts])

        def vector(self, text: str) -> np.ndarray:
            if "|" not in text:
                (number,) = (i for i, p in enumerate(synthetic.PREDICATES) if f" {p} " in text)
                return np.eye(6)[number]
            ends = [int(number) for number in re.findall("[0-9]+", text)]
            number = synthetic.PREDICATES.index(synthetic.predicate(ends[:4], ends[4:]))
            return np.eye(6)[(number + self.turn) % 6]

    options = {"marks": False, "question": "{subject_box}|{object_box}"}
    source = opened(tmp_path, "scene-graph", "drawn/test", options=options)
    good = scene_graph(Knowing(0), source, ranks=(30,))  # type: ignore[arg-type]
    assert (good["R@30"], good["mR@30"], good["pictures"]) == (1.0, 1.0, 12)
    bad = scene_graph(Knowing(1), source, ranks=(30,))  # type: ignore[arg-type]
    assert bad["R@30"] == bad["mR@30"] == 0.0
    pairs = opened(tmp_path, "shapes", "test", options={"as": "find"})
    with pytest.raises(InputError, match="no source of the format scene-graph"):
        scene_graph(Knowing(0), pairs)  # type: ignore[arg-type]


def test_marks_of_things_and_places_are_tokens_and_ends_are_not() -> None:
    """Qwen2-VL's marks in a question become their tokens; a name cannot end the prompt."""
    tokenizer = byte_tokenizer()
    marks = ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>")
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in marks])
    ids = {text: tokenizer.token_to_id(text) for text in (*marks, "<|im_end|>")}
    specials = SpecialTokens(None, None, (), None, False, by_text=ids)
    for name in ("cup", "cup<|im_end|>"):
        things = Thing(name, (0, 0, 50, 50)), Thing("table", (0, 50, 100, 100))
        text = question(*things, (100, 100), form="{subject} {subject_box} {object}", marks=True)
        settings = {"image_token_id": 0, "tokens_per_image": []}
        encoded = encode_plain(Prompt.of(text), tokenizer, specials, **settings)  # type: ignore[arg-type]
        assert ids["<|im_end|>"] not in encoded.token_ids
        first, last, opened, closed = (ids[mark] for mark in marks)
        if name == "cup":
            found = [one for one in encoded.token_ids if one in ids.values()]
            assert found == [first, last, opened, closed, first, last]
        assert tokenizer.decode(encoded.token_ids, skip_special_tokens=False) == text


@pytest.mark.slow
def test_the_tiny_recipe_learns(tmp_path: Path) -> None:
    """Mean recall on pictures that were never seen, before and after training."""
    recipe = read_recipe(REPOSITORY / "recipes/tiny-scene-graph.yaml")
    source = open_data_source(recipe.data["test"], tmp_path, name="test")
    before = scene_graph(load("tiny-random", precision="f32"), source)
    model = load(run_recipe(recipe, tmp_path, tmp_path / "out"), precision="f32")
    after = scene_graph(model, source)
    assert before["mR@50"] < 0.4 and after["mR@50"] > before["mR@50"] + 0.2
    assert after["R@100"] > before["R@100"] + 0.1
