"""The named data sets as samples: the same for a seed, every question and caption once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.data_files import chats, matches, opened, picture_bytes, said, spec, write_tar
from visavis.data.sources import source_fingerprint
from visavis.errors import TrainError
from visavis.inputs import Stored


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with tiny copies of three sets."""
    for name in ("vqa-rad", "grocery-store", "tuxpaint-stamps"):
        (tmp_path / name).mkdir()
    asked = [{"question": f"Question {i}?", "answer": f"answer {i}"} for i in range(5)]
    write_tar(
        tmp_path / "vqa-rad" / "train-000.tar",
        {"a.json": {"qa": asked}, "a.png": picture_bytes(1)},
    )
    fruit = {"class_name": "Red-Apple", "coarse_class": "Apple"}
    write_tar(
        tmp_path / "grocery-store" / "train-000.tar",
        {f"{i}.{kind}": fruit if kind == "json" else picture_bytes(i) for i in range(2)
         for kind in ("json", "png")},
    )  # fmt: skip
    stamps = {"0": "A red fox that sits in the snow and looks at a far away bird.", "1": "A fox."}
    write_tar(
        tmp_path / "tuxpaint-stamps" / "train-000.tar",
        {f"{i}.{kind}": {"caption": text} if kind == "json" else picture_bytes(int(i))
         for i, text in stamps.items() for kind in ("json", "png")},
    )  # fmt: skip
    return tmp_path


def test_questions_come_in_groups_each_once(root: Path) -> None:
    options = {"questions_per_example": 2, "seed": 1}
    found = chats(opened(root, "records", "vqa-rad", options=options))
    assert [one.id for one in found] == ["a#0", "a#1", "a#2"]
    assert [len(one.prompt.messages) for one in found] == [4, 4, 2]
    asked = [part for one in found for turn in said(one.prompt)[::2] for part in turn]
    assert sorted(asked) == ["Question 0?", *(f"Question {i}?" for i in range(1, 5)),
                             *["[Stored]"] * 3]  # fmt: skip
    assert all(said(one.prompt)[0][0] == "[Stored]" for one in found)
    for one in found:
        turns = said(one.prompt)
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            assert question[-1][9] == answer[0][-1]


def test_wording_is_the_seeds(root: Path) -> None:
    def texts(seed: int) -> list[str]:
        options = {"seed": seed}
        return [one.prompt.text for one in opened(root, "records", "vqa-rad", options=options)]

    assert texts(1) == texts(1) != texts(2)
    prints = {
        source_fingerprint(spec("records", "vqa-rad", options={"seed": seed}), root)
        for seed in (1, 2)
    }
    assert len(prints) == 2


def test_labels_and_captions_are_answers(root: Path) -> None:
    first, _ = chats(opened(root, "records", "grocery-store"))
    assert said(first.prompt)[1] == ["A photo of a Red Apple."]
    long, short = chats(
        opened(root, "records", "tuxpaint-stamps", options={"max_caption_words": 4})
    )
    assert said(long.prompt)[1] == ["A red fox that"]
    assert said(short.prompt)[1] == ["A fox."]


def test_texts_find_their_pictures(root: Path) -> None:
    found = matches(opened(root, "records", "grocery-store", options={"as": "match"}))
    assert [one.group for one in found] == ["Red Apple"] * 2
    assert {one.query.text for one in found} <= {"a photo of Red Apple", "Red Apple"}
    picture = found[1].target.visuals[0].source
    assert isinstance(picture, Stored) and picture.read() == picture_bytes(1)


def test_sets_that_do_not_fit_are_refused(root: Path) -> None:
    with pytest.raises(TrainError, match="there are no records"):
        opened(root, "records", "vqa-rad", options={"as": "match"})
    with pytest.raises(TrainError, match="did you mean 'vqa-rad'"):
        opened(root, "records", "vqa-rat")
    with pytest.raises(TrainError, match="as: Input should be 'chat' or 'match'"):
        opened(root, "records", "vqa-rad", options={"as": "chats"})


def test_a_fingerprint_is_of_pictures_too(root: Path) -> None:
    source = spec("records", "tuxpaint-stamps")
    before = source_fingerprint(source, root)
    path = root / "tuxpaint-stamps" / "train-000.tar"
    content = path.read_bytes()
    place = content.index(b"IDAT")
    path.write_bytes(content[:place] + b"X" + content[place + 1 :])
    assert source_fingerprint(source, root) != before
