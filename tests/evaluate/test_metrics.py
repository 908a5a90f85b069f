"""Metrics on cases worked out by hand, and on a tiny model end to end."""

from __future__ import annotations

import io

import numpy as np
import pytest

from tests.fakes import picture, tiny_model
from visavis.data.datasets import Record
from visavis.evaluate.retrieval import recall, retrieval
from visavis.evaluate.vqa import exact_match, normalise
from visavis.evaluate.zeroshot import zero_shot


def made_records(number: int) -> list[Record]:
    records = []
    for seed in range(number):
        file = io.BytesIO()
        picture(seed).save(file, "PNG")
        records.append(
            Record(
                str(seed),
                file.getvalue(),
                caption=f"picture {seed}",
                questions=(("what?", "that"),),
                label=f"class {seed % 2}",
                group="things",
            )
        )
    return records


def test_recall_by_hand() -> None:
    similarity = np.array([[0.9, 0.1, 0.2], [0.8, 0.3, 0.5], [0.1, 0.2, 0.3]])
    right = np.eye(3, dtype=bool)
    scores = recall(similarity, right)  # ranks 1, 3, 1
    assert scores == {"R@1": pytest.approx(2 / 3, abs=1e-4), "R@5": 1.0, "R@10": 1.0}


def test_several_right_answers_count_by_their_best() -> None:
    similarity = np.array([[0.1, 0.9, 0.5, 0.4]])
    right = np.array([[True, True, False, False]])
    assert recall(similarity, right)["R@1"] == 1.0
    assert recall(-similarity, right)["R@1"] == 1.0  # then the other right one is first


def test_answers_are_compared_without_case_and_full_stop() -> None:
    assert normalise(" Red.\n") == "red" == normalise("red")
    assert normalise("3.5 cm") == "3.5 cm"


def test_suites_run_on_a_tiny_model() -> None:
    model, records = tiny_model(), made_records(12)
    found = retrieval(model, records)
    assert set(found) == {"text_to_image", "image_to_text"}
    assert found["text_to_image"]["R@10"] >= found["text_to_image"]["R@1"]
    asked = exact_match(model, records, max_questions=3, max_new_tokens=2)
    assert asked["questions"] == 3 and 0 <= asked["exact_match"] <= 1
    named = zero_shot(model, records)
    assert (named["classes"], named["chance"]) == (2, 0.5)
    assert zero_shot(model, records, coarse=True)["top1"] == 1.0  # one group only
