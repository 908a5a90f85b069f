"""Adapters to other evaluation packages, each against the installed package where there is one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.evaluate.official_files import embedded, photos, write_json, write_parquet
from tests.fakes import tiny_model
from visavis.errors import InputError
from visavis.evaluate.mteb import Encoder, prompts_of, task_instruction, use_local_files
from visavis.evaluate.vlmevalkit import export_answers


def vidore_folder(root: Path, number: int = 6) -> Path:
    """Write a repository of ViDoRe as it lies on disk after a download."""
    corpus = [{"corpus-id": i, "image": embedded(i)} for i in range(number)]
    queries = [{"query-id": i, "query": f"what is on page {i}"} for i in range(number)]
    qrels = [{"query-id": i, "corpus-id": i, "score": 1} for i in range(number)]
    for name, rows in (("corpus", corpus), ("queries", queries), ("qrels", qrels)):
        write_parquet(root / name / "test-00000.parquet", rows)
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {name}/test-*\n"
        for name in ("corpus", "queries", "qrels")
    )
    (root / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return root


@pytest.mark.slow
def test_vidore_runs_in_mteb_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mteb = pytest.importorskip("mteb")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    vidore_folder(tmp_path / "arxivqa_test_subsampled_beir")
    task = mteb.get_task("VidoreArxivQARetrieval")
    use_local_files([task], tmp_path)
    encoder = Encoder(tiny_model())
    found = mteb.evaluate(encoder, task, cache=None)
    scores = found.task_results[0].scores["test"][0]
    assert found.model_name == "visavis/tiny" and 0 <= scores["ndcg_at_5"] <= 1
    # The same by hand: cosines of our own vectors, ranked.
    model = tiny_model()
    queries = model.embed(
        [f"what is on page {i}" for i in range(6)],
        instruction="Find a screenshot that relevant to the user's question.",
    )
    import io

    from PIL import Image

    pages = model.embed([Image.open(io.BytesIO(embedded(i)["bytes"])) for i in range(6)])
    ranks = [int((row > row[i]).sum()) + 1 for i, row in enumerate(queries @ pages.T)]
    expected = np.mean([1 / np.log2(rank + 1) if rank <= 5 else 0 for rank in ranks])
    assert scores["ndcg_at_5"] == pytest.approx(expected, abs=1e-4)


def test_batches_of_mteb_become_items() -> None:
    image = photos()["coffee"]
    prompts = prompts_of({"text": ["a", "", "c"], "image": [image, image, [image, image]]})
    assert [len(prompt.visuals) for prompt in prompts] == [1, 1, 2]
    assert [prompt.text for prompt in prompts] == ["a", "", "c"]
    clip = np.zeros((3, 3, 8, 8), np.uint8)  # frames, channels, height, width
    (video,) = prompts_of({"video": [SimpleNamespace(frames=clip)]})
    assert len(video.visuals) == 1
    with pytest.raises(InputError, match="expected text, image or video"):
        prompts_of({"audio": [1]})


def test_instructions_go_to_their_side() -> None:
    both = SimpleNamespace(prompt={"query": "Find it."})
    assert task_instruction(both, SimpleNamespace(value="query")) == "Find it."
    assert task_instruction(both, SimpleNamespace(value="document")) is None
    one = SimpleNamespace(prompt="Classify it.")
    assert task_instruction(one, None) == "Classify it."
    assert task_instruction(one, SimpleNamespace(value="document")) is None
    assert task_instruction(SimpleNamespace(prompt=None), None) is None


def test_the_encoder_gives_our_vectors() -> None:
    model = tiny_model()
    encoder = Encoder(model)
    batches = [{"text": ["a cat", "a dog"]}, {"text": ["a cup"]}]
    found = encoder.encode(batches, task_metadata=SimpleNamespace(prompt=None))
    assert found == pytest.approx(model.embed(["a cat", "a dog", "a cup"]), abs=1e-6)
    cosines = encoder.similarity(found, found)
    assert np.diag(cosines.numpy()) == pytest.approx(1, abs=1e-5)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    dataset = {"path": "mteb/some_set"}
    task = SimpleNamespace(metadata=SimpleNamespace(name="Task", dataset=dataset))
    with pytest.raises(InputError, match="no folder Task or some_set"):
        use_local_files([task], tmp_path)
    (tmp_path / "some_set").mkdir()
    use_local_files([task], tmp_path)
    assert dataset == {"path": str(tmp_path / "some_set"), "revision": "local"}


@pytest.mark.slow
def test_lmms_eval_finds_and_asks_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    registry_v2 = pytest.importorskip("lmms_eval.models.registry_v2")
    from visavis.evaluate.lmms_eval import Visavis, manifest

    registry = registry_v2.ModelRegistryV2()
    registry.register_manifest(manifest())
    assert registry.get_model_class("visavis") is Visavis
    monkeypatch.setattr("visavis.api.load", lambda name, **_: tiny_model())
    model = registry.get_model_class("visavis")(pretrained="tiny", batch_size=2)
    model.task_dict = {"task": {"test": [{"n": i} for i in range(3)]}}
    requests: list[Any] = [
        SimpleNamespace(
            args=(
                f"<image>\nWhat is it, {i}?",
                {"max_new_tokens": 4, "temperature": 0, "do_sample": False, "until": ["\n\n"]},
                lambda doc: [photos()["coffee"]],
                i,
                "task",
                "test",
            )
        )
        for i in range(3)
    ]
    expected = tiny_model().chat("What is it, 1?", [photos()["coffee"]], max_new_tokens=4).text
    answers = model.generate_until(requests)
    assert len(answers) == 3 and answers[1] == expected


def test_answers_are_exported_for_vlmevalkit(tmp_path: Path) -> None:
    from openpyxl import load_workbook

    samples = [{"id": str(i), "answer": f"A. {i}"} for i in (7, 8)]
    write_json(tmp_path / "run/tasks/MMBench.json", {"samples": samples})
    table = tmp_path / "MMBench_DEV_EN.tsv"
    table.write_text("index\tquestion\timage\tA\n7\twhat\tAAAA\tx\n8\twho\tAAAA\ty\n")
    target = tmp_path / "nano_MMBench_DEV_EN.xlsx"
    assert export_answers(tmp_path / "run", "MMBench", table, target) == 2
    sheet = load_workbook(target).active
    assert sheet is not None
    rows = [[cell.value for cell in row] for row in sheet.rows]
    assert rows[0] == ["index", "question", "A", "prediction"]
    assert rows[1:] == [[7, "what", "x", "A. 7"], [8, "who", "y", "A. 8"]]
    write_json(tmp_path / "run/tasks/MMBench.json", {"samples": samples[:1]})
    with pytest.raises(InputError, match="index 8"):
        export_answers(tmp_path / "run", "MMBench", table, target)
    assert json.loads((tmp_path / "run/tasks/MMBench.json").read_text())["samples"] == samples[:1]
