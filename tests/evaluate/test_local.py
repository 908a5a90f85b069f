"""The suite `local`: a user's own tables and folders, in one command."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.evaluate.official_files import embedded, save, write_jsonl, write_parquet
from tests.fakes import tiny_model
from visavis.errors import InputError
from visavis.evaluate.readers.local import discover
from visavis.evaluate.run import evaluate


def test_captions_run_both_ways(tmp_path: Path) -> None:
    with (tmp_path / "photos.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for i in range(5):
            save(tmp_path / f"images/{i}.png", i)
            writer.writerow([f"images/{i}.png", f'photo "{i}", a caption'])
    found = evaluate(tiny_model(), "local", tmp_path)
    assert set(found["tasks"]) == {"photos text-to-image", "photos image-to-text"}
    assert found["incomplete"] == [] and found["tasks"]["photos text-to-image"]["n"] == 5
    one_file = evaluate(tiny_model(), "local", tmp_path / "photos.csv")
    assert one_file["tasks"]["photos text-to-image"]["hit@5"] == 1


def test_pairs_with_several_right_targets(tmp_path: Path) -> None:
    rows = [
        {"query_text": "red", "target_text": "a red cup", "query_instruction": "Find it:"},
        {"query_text": "red", "target_text": "a red car", "query_instruction": "Find it:"},
        {"query_text": "blue", "target_image": "b.png"},
    ]
    save(tmp_path / "b.png", 1)
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    found = evaluate(tiny_model(), "local", tmp_path)["tasks"]["pairs"]
    assert found["n"] == 2 and found["info"]["candidates"] == 3
    assert found["recall@5"] == 1 and found["precision@5"] == pytest.approx((2 + 1) / 2 / 5)


def test_beir_folder_with_images_in_the_tables(tmp_path: Path) -> None:
    corpus = [{"corpus-id": i, "image": embedded(i)} for i in range(4)]
    write_parquet(tmp_path / "corpus/a.parquet", corpus)
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "q1", "text": "what"}])
    with (tmp_path / "qrels.tsv").open("w") as file:
        file.write("query-id\tcorpus-id\tscore\nq1\t2\t1\n")
    found = evaluate(tiny_model(), "local", tmp_path)["tasks"][tmp_path.name]
    assert found["headline"] == "ndcg_linear@10" and found["n"] == 1
    assert found["info"]["candidates"] == 4


def test_questions_with_and_without_options(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 0)
    rows = [
        {"image": "a.png", "question": "Which?", "options": ["a cat", "a dog"], "answer": "a dog"},
        {"image": "a.png", "question": "Which one?", "options": ["x", "y"], "answer": "B"},
    ]
    write_jsonl(tmp_path / "choice.jsonl", rows)
    write_jsonl(tmp_path / "open.jsonl", [{"question": "Colour?", "answer": "red|dark red"}])
    found = evaluate(tiny_model(), "local", tmp_path)
    assert found["tasks"]["choice"]["n"] == 2 and found["tasks"]["open"]["n"] == 1
    assert set(found["tasks"]["open"]) >= {"accuracy", "has_words"}


def test_classification_by_folder_and_by_table(tmp_path: Path) -> None:
    for i in range(6):
        save(tmp_path / "sorted" / ["cups", "space_ships"][i % 2] / f"{i}.png", i)
    found = evaluate(tiny_model(), "local", tmp_path / "sorted")["tasks"]["sorted"]
    assert found["n"] == 6 and found["info"]["candidates"] == 2 and found["hit@5"] == 1
    rows = [
        {"image": f"sorted/{['cups', 'space_ships'][i % 2]}/{i}.png", "label": "x"}
        for i in range(2)
    ]
    write_jsonl(tmp_path / "labels.jsonl", rows)
    assert evaluate(tiny_model(), "local", tmp_path / "labels.jsonl")["tasks"]["labels"]["n"] == 2


def test_bad_records_are_named(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 0)
    rows = [
        {"id": "one", "image": "a.png", "question": "Which?", "options": ["x", "y"], "answer": "z"},
        {"id": "two", "image": "gone.png", "question": "Which?", "options": ["x"], "answer": "x"},
        {"id": "ok", "image": "a.png", "question": "Which?", "options": ["x"], "answer": "x"},
        {"id": "ok", "image": "a.png", "question": "Which?", "options": ["x"], "answer": "x"},
    ]
    write_jsonl(tmp_path / "t.jsonl", rows)
    found = evaluate(tiny_model(), "local", tmp_path)
    assert found["tasks"]["t"]["n"] == 1 and found["tasks"]["t"]["problems"] == 3
    assert "'z' is none of its options" in found["incomplete"][0]["reason"]


@pytest.mark.parametrize("name", ["empty.jsonl", "odd.jsonl", "torn.csv"])
def test_what_cannot_be_used_says_what_can(tmp_path: Path, name: str) -> None:
    text = {"empty.jsonl": "", "odd.jsonl": json.dumps({"x": 1}), "torn.csv": "image,label\na\n"}
    (tmp_path / name).write_text(text[name])
    with pytest.raises(InputError, match="no rows|expected|another length"):
        discover(tmp_path)
