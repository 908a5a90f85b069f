"""Suites on tiny checkpoints, written as published, of the families that the papers evaluate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import visavis
from tests.evaluate import official_files as files
from tests.evaluate.vqa_files import write_vqa
from visavis.evaluate.run import Options, evaluate

pytest.importorskip("transformers", reason="needs transformers (visavis[dev])")


def qwen2_vl(folder: Path) -> Any:
    from tests.parity.qwen2_vl_files import save_qwen2_vl

    return save_qwen2_vl(folder, max_position_embeddings=4096)


def llava_next(folder: Path) -> Any:
    from tests.checkpoints.anyres_files import save_next

    return save_next(folder)


def onevision(folder: Path) -> Any:
    from tests.checkpoints.anyres_files import save_onevision

    return save_onevision(folder)


FAMILIES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "Qwen2-VL": (qwen2_vl, "vlm2vec-v2"),
    "LLaVA-NeXT": (llava_next, "vlm2vec-v1"),
    "LLaVA-OneVision": (onevision, "llave"),
}
IMAGE_TASKS = ("VOC2007", "OK-VQA", "VisDial", "CIRR", "RefCOCO-Matching")


@pytest.mark.parametrize("name", FAMILIES)
def test_embedding_and_answering(name: str, tmp_path: Path) -> None:
    save, profile = FAMILIES[name]
    save(tmp_path / "model")
    model = visavis.load(tmp_path / "model", precision="f32", device="cpu", profile=profile)
    files.write_test_instruct(tmp_path, 3)
    found = evaluate(model, "mmeb-v1", tmp_path, tasks=IMAGE_TASKS)
    assert found["incomplete"] == [] and found["model"]["profile"] == profile
    files.write_pages(tmp_path, 3)
    found = evaluate(model, "mmeb-v2", tmp_path, tasks=["ViDoRe_docvqa"])
    assert found["incomplete"] == []
    if name != "LLaVA-NeXT":  # which takes no videos
        files.write_videos(tmp_path, 2)
        options = Options(frames=2)
        found = evaluate(model, "mmeb-v2", tmp_path, tasks=["MSR-VTT"], options=options)
        assert found["incomplete"] == []
    write_vqa(tmp_path)
    found = evaluate(model, "vqa", tmp_path, tasks=["GQA"])
    assert found["incomplete"] == []
