"""MMEB's instructions: all tasks are there, and joined to a text they are the data's strings."""

from __future__ import annotations

from visavis.data.mmeb_strings import IMAGE_TASKS, PAGES, TASKS, VIDEO_TASKS
from visavis.processing.prompt_encoder import PROFILES


def test_every_task() -> None:
    assert (len(IMAGE_TASKS), len(VIDEO_TASKS), len(TASKS)) == (36, 18, 54)
    for strings in (*TASKS.values(), PAGES):
        for text in (strings.query, strings.target):
            assert text == text.strip() and "  " not in text and "{" not in text
    with_pictures = [name for name, strings in IMAGE_TASKS.items() if strings.target]
    assert len(with_pictures) == 14, "ten retrieval tasks and four of grounding"


def test_joined_as_in_the_data() -> None:
    first, second = PROFILES["vlm2vec-v1"], PROFILES["vlm2vec-v2"]
    asked = first.instructed(TASKS["OK-VQA"].query, "What is it?")
    assert asked == "Represent the given image with the following question: What is it?\n"
    assert first.instructed(TASKS["CIRR"].target, "") == "Represent the given image.\n"
    found = second.instructed(TASKS["MSR-VTT"].query, "a man sings")
    assert found == "Find a video that contains the following visual content: a man sings"
