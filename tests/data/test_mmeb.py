"""MMEB's instructions: all tasks are there, and joined to a text they are the data's strings."""

from __future__ import annotations

from visavis.data.formats.retrieval import task_instructions
from visavis.processing.prompt_config import PROFILES

IMAGE, VIDEO = task_instructions("image"), task_instructions("video")


def test_every_task() -> None:
    assert (len(IMAGE), len(VIDEO), len(IMAGE | VIDEO)) == (36, 18, 54)
    assert len(task_instructions("visrag")) == 10
    pages = task_instructions("document")["all"]
    for instructions in (*IMAGE.values(), *VIDEO.values(), pages):
        assert instructions.query
        for text in (instructions.query, instructions.target):
            assert text == text.strip() and "  " not in text and "{" not in text
    with_images = [name for name, one in IMAGE.items() if one.target]
    assert len(with_images) == 14, "ten retrieval tasks and four of grounding"


def test_joined_as_in_the_data() -> None:
    first, second = PROFILES["vlm2vec-v1"], PROFILES["vlm2vec-v2"]
    asked = first.instructed(IMAGE["OK-VQA"].query, "What is it?")
    assert asked == "Represent the given image with the following question: What is it?\n"
    assert first.instructed(IMAGE["CIRR"].target, "") == "Represent the given image.\n"
    found = second.instructed(VIDEO["MSR-VTT"].query, "a man sings")
    assert found == "Find a video that contains the following visual content: a man sings"
