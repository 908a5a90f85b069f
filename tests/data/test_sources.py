"""Records: pairs out of tars, damaged shards named, every source readable where its data is."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path

import pytest

from visavis.data.datasets import SOURCES, TRAINING_SOURCES, Record, chat_pairs, load_source
from visavis.data.kinds import ask_presence, kinds_of, with_article, with_presence
from visavis.data.tar_shards import read_shards
from visavis.errors import TrainError, UnknownNameError


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as shard:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    return path


def test_pictures_and_fields_meet_whatever_their_order(tmp_path: Path) -> None:
    members = {
        "a.jpg": b"A",
        "a.json": json.dumps({"x": 1}).encode(),
        "b.json": json.dumps({"x": 2}).encode(),
        "notes.txt": b"ignored",
        "b.png": b"B",
    }
    shard = write_tar(tmp_path / "train-000.tar", members)
    found = [(key, fields, image.read()) for key, fields, image in read_shards([shard])]
    assert found == [("a", {"x": 1}, b"A"), ("b", {"x": 2}, b"B")]


def test_a_record_without_its_picture_is_named(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "train-000.tar", {"lonely.json": b"{}"})
    with pytest.raises(TrainError, match="'lonely'"):
        list(read_shards([shard]))


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100])
def test_a_damaged_shard_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    shard = tmp_path / "train-000.tar"
    shard.write_bytes(content)
    with pytest.raises(TrainError, match="cannot read"):
        list(read_shards([shard]))


def test_missing_data_and_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="--data"):
        load_source("openclipart", tmp_path)
    with pytest.raises(UnknownNameError, match="did you mean 'openclipart'"):
        load_source("open-clipart", tmp_path)


def test_easy_vqa_splits_do_not_meet(tmp_path: Path) -> None:
    pytest.importorskip("easy_vqa")
    train = load_source("easy-vqa", tmp_path)
    test = load_source("easy-vqa/test", tmp_path)
    assert (len(train), len(test)) == (4000, 1000)
    assert train[0].caption == "a blue rectangle"
    assert sum(record.caption != "" for record in train) > 3000
    assert sum(len(record.questions) for record in train + test) == 48_248


@pytest.mark.shared
@pytest.mark.parametrize("name", [name for name in SOURCES if not name.startswith("easy")])
def test_every_source_yields_what_training_needs(name: str, shared_data: Path) -> None:
    records = load_source(name, shared_data)
    assert len({record.key for record in records}) > 0.99 * len(records) > 0
    assert all(record.image for record in records) or name == "imagenet-classes"
    assert all(record.caption or record.questions for record in records)


def test_names_of_training_sources_are_no_evaluation_splits() -> None:
    assert {SOURCES[name][1] for name in TRAINING_SOURCES} == {"train"}


def labelled(names: str) -> list[Record]:
    return [Record(str(number), b"", label=name) for number, name in enumerate(names.split())]


def test_presence_is_asked_as_often_with_yes_as_with_no() -> None:
    records = with_presence(labelled("cat dog horse cat owl"))
    answers = [answer for record in records for _, answer in record.questions]
    assert answers == ["Yes", "No"] * 5
    for record in records:
        (yes, _), (no, _) = record.questions
        assert with_article(record.label) in yes and record.label not in no
    assert with_presence(labelled("cat cat")) == labelled("cat cat"), "no other to ask about"


def test_presence_is_asked_of_labels_and_kinds_by_a_coin() -> None:
    records = labelled("owl goldfish rose owl wrench nothing-known " * 40)
    asked = ask_presence(records, 4, seed=0)
    pairs = [(record, *pair) for record in asked for pair in record.questions]
    yes = [(record, question) for record, question, answer in pairs if answer == "Yes"]
    no = [(record, question) for record, question, answer in pairs if answer == "No"]
    assert 0.4 < len(yes) / len(pairs) < 0.6
    assert 3 * len(asked) < len(pairs) <= 4 * len(asked)
    for record, question in yes:
        named = [with_article(name) for name in (record.label, *kinds_of(record))]
        assert any(f" {name}" in question for name in named), question
    for record, question in no:
        for name in (record.label, *kinds_of(record)):
            assert f" {with_article(name)}" not in question, question
    assert any(" an animal" in question for _, question in yes)
    assert asked == ask_presence(records, 4, seed=0) != ask_presence(records, 4, seed=1)


def test_some_names_are_replaced_by_their_kind() -> None:
    owl, other = labelled("owl nothing-known")
    assert kinds_of(owl) == ["bird", "animal"] and kinds_of(other) == []

    def answers(record: Record, general: float) -> list[str]:
        draw = random.Random(0)
        pairs = [
            chat_pairs(record, draw, questions_per_example=1, max_caption_words=9, general=general)
            for _ in range(200)
        ]
        return [answer for [[(_, answer)]] in pairs]

    assert set(answers(owl, 0.0)) == {"A photo of an owl."}
    assert 20 < answers(owl, 0.2).count("A photo of a bird.") < 60
    assert set(answers(other, 0.2)) == {"A photo of a nothing-known."}


@pytest.mark.shared
def test_parts_of_a_set_do_not_meet(shared_data: Path) -> None:
    for name in ("caltech101", "oxford-pets", "fluent-emoji", "grocery-store"):
        parts = [n for n in SOURCES if n == name or n.startswith(f"{name}/")]
        keys = [{record.key for record in load_source(n, shared_data)} for n in parts]
        assert all(keys) and len(set().union(*keys)) == sum(map(len, keys)), name
    new = {record.label for record in load_source("caltech101/val-new", shared_data)}
    assert not new & {record.label for record in load_source("caltech101", shared_data)}
