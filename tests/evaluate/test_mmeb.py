"""MMEB-V1 and V2 from miniatures of their official files, end to end with tiny models."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest

from tests.evaluate import official_files as files
from tests.fakes import tiny_model
from visavis.errors import InputError
from visavis.evaluate.check import check_suite, fetch_commands
from visavis.evaluate.items import VISUAL
from visavis.evaluate.leaderboard import read_leaderboard
from visavis.evaluate.prompts import VERBATIM, embed_items, profile_name, with_profile
from visavis.evaluate.readers import beir, mmeb_image, mmeb_video, text
from visavis.evaluate.run import Options, evaluate
from visavis.evaluate.suite import load_suite
from visavis.inputs import Prompt, Text
from visavis.processing.prompt_config import PROFILES

V1, V2 = load_suite("mmeb-v1"), load_suite("mmeb-v2")


@pytest.fixture(scope="module")
def v1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files.write_mmeb_eval(tmp_path_factory.mktemp("v1"))


@pytest.fixture(scope="module")
def v2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = files.write_test_instruct(tmp_path_factory.mktemp("v2"))
    return files.write_pages(files.write_videos(root))


def test_the_registry_holds_the_published_tasks_and_averages() -> None:
    assert len(V1.tasks) == 36 and len(V2.tasks) == 78
    assert len(V1.selected("IND")) == 20 and len(V1.selected("OOD")) == 16
    counts = {name: len(V2.selected(name)) for name in ("image", "video", "visdoc")}
    assert counts == {"image": 36, "video": 18, "visdoc": 24}

    def mean(suite: Any, average: str, model: str) -> float:
        return float(np.mean([task.anchors[model] for task in suite.selected(average)]))

    # The means that the papers and the leaderboard print.
    assert mean(V1, "all", "VLM2Vec-V1-7B") == pytest.approx(0.655, abs=5e-4)
    assert mean(V1, "IND", "VLM2Vec-V2-2B") == pytest.approx(0.688, abs=5e-4)
    assert mean(V1, "OOD", "VLM2Vec-V2-2B") == pytest.approx(0.599, abs=5e-4)
    assert mean(V2, "visdoc", "GME-7B") == pytest.approx(0.752, abs=5e-4)
    assert mean(V2, "all", "VLM2Vec-V2-2B") == pytest.approx(0.5802, abs=5e-4)


def test_all_of_mmeb_v1_runs(v1: Path) -> None:
    found = evaluate(tiny_model(), "mmeb-v1", v1)
    assert found["incomplete"] == [] and len(found["tasks"]) == 36
    assert None not in found["averages"].values()
    voc = found["tasks"]["VOC2007"]
    assert voc["n"] == 5 and 0 <= voc["interval"][0] <= voc["hit@1"] <= voc["interval"][1] <= 1
    mean = np.mean([found["tasks"][task]["hit@1"] for task in V1.tasks])
    assert found["averages"]["all"] == pytest.approx(mean)
    assert found["model"]["profile"] == "own" and found["tasks"]["VOC2007"]["info"]["data"]


def test_all_of_mmeb_v2_runs(v2: Path, tmp_path: Path) -> None:
    found = evaluate(tiny_model(), "mmeb-v2", v2, options=Options(output=tmp_path))
    assert found["incomplete"] == [] and len(found["tasks"]) == 78
    assert (
        found["tasks"]["K700"]["info"] | {"candidates": 700, "frames": 8}
        == (found["tasks"]["K700"]["info"])
    )
    assert found["tasks"]["ViDoSeek-page"]["info"]["overlay"] == "ViDoSeek-page-fixed"
    board = json.loads((tmp_path / "leaderboard.json").read_text())
    assert {name: len(tasks) for name, tasks in board["metrics"].items()} == {
        "image": 36,
        "video": 18,
        "visdoc": 24,
    }
    assert "ViDoSeek-page-fixed" in board["metrics"]["visdoc"]
    scores = read_leaderboard(tmp_path / "leaderboard.json", V2)
    assert scores == {n: t[t["headline"]] for n, t in found["tasks"].items()}


def test_the_text_tasks_of_mmeb_v3_run(tmp_path: Path) -> None:
    suite = load_suite("mmeb-v3")
    assert len(suite.tasks) == 190 and len(suite.selected("text")) == 53
    files.write_texts(tmp_path)
    names = [task.name for task in suite.selected("text")]
    found = evaluate(tiny_model(), suite, tmp_path, tasks=names)
    assert found["incomplete"] == [] and found["averages"]["text"] is not None
    assert found["averages"]["all"] is None  # audio and others are not run
    query = text.read(suite.tasks["Audience-v1"], tmp_path).queries[0]
    assert query.verbatim == "changed 0 query 0" and query.instruction == "changed 0"
    document = text.read(suite.tasks["NanoNQ"], tmp_path).candidates[0]
    assert document.verbatim == "title 0\nbody 0"


def test_tasks_that_are_not_run_say_why(tmp_path: Path) -> None:
    suite = load_suite("mmeb-v3")
    with pytest.raises(InputError, match="ESC-50 of mmeb-v3 is not run: needs a model that hears"):
        suite.choose(["ESC-50"])
    listed = [one for one in check_suite(suite, tmp_path) if one.status == "not run"]
    assert len(listed) == 190 - 78 - 53


def test_the_three_layouts_hold_the_same_task(v1: Path, v2: Path, tmp_path: Path) -> None:
    v3 = files.write_test_instruct(tmp_path, layout="v3")
    for name in ("VOC2007", "VisDial", "CIRR", "RefCOCO-Matching", "EDIS"):
        task = V1.tasks[name]
        found = [mmeb_image.read(task, root) for root in (v1, v2, v3)]
        assert [one.notes["layout"] for one in found] == [
            "MMEB-eval",
            "MMEB_Test_Instruct",
            "MMEB_Test_Instruct",
        ]
        assert len({len(one.candidates) for one in found}) == 1
        texts = [[(q.text, q.instruction) for q in one.queries] for one in found]
        assert texts[0] == texts[1] == texts[2]


# Written by VLM2Vec's own data_prepare functions (main@6e1e1d4, qwen2_vl) on these records, with
# the model's image or video token in the place of the mark; all 3,996 strings of the miniatures
# were compared once.
GOLDEN = {
    "VOC2007": ("<>\nIdentify the object shown in the image\n", "label 0 of VOC2007"),
    "OK-VQA": (
        "<>\nRepresent the given image with the following question: OK-VQA text 0\n",
        "label 0 of OK-VQA",
    ),
    "VisDial": (
        "Represent the given dialogue about an image, which is used for image retrieval: VisDial "
        "text 0\n\n",
        "<>\nRepresent the given image\n",
    ),
    "EDIS": (
        "Find a news image that matches the provided caption: EDIS text 0\n",
        "<>\nRepresent the given image with related text information: caption 0\n",
    ),
    "NIGHTS": (
        "<>\nFind a day-to-day image that looks similar to the provided image.\n",
        "<>\nRepresent the given image.",
    ),
    "MSCOCO": (
        "<>\nCrop the image to to isolate the object labeled as MSCOCO text 0\n",
        "<>\nRepresent the given cropped image of the object",
    ),
    "RefCOCO-Matching": (
        "<>\nSelect the portion of the image that follows the language expressions: "
        "RefCOCO-Matching text 0\n",
        "<>\nSelect the portion of the image that follows the language expressions: caption 0\n",
    ),
    "Breakfast": (
        "<> Recognize the breakfast type that the person is cooking in the video. ",
        "pancake",
    ),
    "MSR-VTT": (
        "Find a video that contains the following visual content: a caption of video0",
        "<> Understand the content of the provided video.",
    ),
    "EgoSchema": (
        "<> Given a video and a question, select the most accurate answer from the provided "
        "candidates. Return only the exact text of your chosen answer. Question:  What happens 0?A."
        " a cat. B. a dog. C. a rocket. D. a cup. E. a face.",
        "a cat",
    ),
    "MVBench": (
        "<> Given a video and a question, select the most accurate answer from the provided "
        "candidates. Return only the exact text of your chosen answer. Question:  Where is it 0?\n"
        "Options:\n(A) a cat\n(B) a dog\n(C) a rocket",
        "(A) a cat",
    ),
    "Charades-STA": (
        "<> Find the clip that corresponds to the described scene in the given video: scene 0",
        "<> Understand the content of the provided video.",
    ),
    "ViDoRe_arxivqa": (
        "Find a document image that matches the given query: question 0 about a page",
        "<> Understand the content of the provided document image.",
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_verbatim_strings_are_those_of_vlm2vec(v2: Path, name: str) -> None:
    task = V2.tasks[name]
    reader = {"mmeb-image": mmeb_image, "mmeb-video": mmeb_video, "beir": beir}[task.reader]
    data = reader.read(task, v2)
    own = data.queries[0], data.candidates[data.relevant[0].candidates[0]]
    assert tuple(item.verbatim.replace(VISUAL, "<>") for item in own) == GOLDEN[name]


@pytest.mark.parametrize("name", VERBATIM)
def test_a_model_trained_on_the_strings_embeds_them_as_they_are(v1: Path, name: str) -> None:
    """The image's tokens stand in the place of the mark, and no separator of the profile's own."""
    model = with_profile(tiny_model(), PROFILES[name])
    assert profile_name(model.profile) == name
    item = mmeb_image.read(V1.tasks["VOC2007"], v1).queries[0]
    image = item.visuals[0]
    bare = with_profile(model, replace(model.profile, embed_image_end=""))
    asked = Prompt.of([image, Text("\nIdentify the object shown in the image\n")])
    encoded = bare.encoder.item(asked)
    prefix, suffix = model.profile.embed_prefix, model.profile.embed_suffix
    ids = [i for i in encoded.token_ids if i != model.vlm.config.image_token_id]
    text = prefix + "\nIdentify the object shown in the image\n" + suffix
    assert model.tokenizer.decode(ids, skip_special_tokens=False) == text
    assert embed_items(model, [item]) == pytest.approx(bare.embed([asked]), abs=1e-6)


def test_other_models_get_instruction_and_text(v1: Path) -> None:
    model = tiny_model()
    item = mmeb_image.read(V1.tasks["OK-VQA"], v1).queries[0]
    expected = model.embed(
        [{"image": item.visuals[0], "text": "OK-VQA text 0"}],
        instruction="Represent the given image with the following question:",
    )
    assert embed_items(model, [item]) == pytest.approx(expected, abs=1e-6)


# --- bad input ------------------------------------------------------------------------------------


@pytest.fixture
def own(v1: Path, tmp_path: Path) -> Path:
    """A copy of two tasks' files that a test may damage."""
    for name in ("VOC2007", "MSCOCO_t2i"):
        shutil.copytree(v1 / "MMEB-eval" / name, tmp_path / "MMEB-eval" / name)
        shutil.copytree(v1 / "eval_images" / name, tmp_path / "eval_images" / name)
    return tmp_path


def annotation(root: Path, name: str) -> Path:
    return next((root / "MMEB-eval" / name).glob("*.parquet"))


def test_a_missing_image_is_named_and_the_other_task_is_run(own: Path) -> None:
    (own / "eval_images/VOC2007/q3.png").unlink()
    found = evaluate(tiny_model(), "mmeb-v1", own, tasks=["VOC2007", "MSCOCO_t2i"])
    assert found["tasks"]["VOC2007"]["n"] == 4 and found["tasks"]["MSCOCO_t2i"]["n"] == 5
    assert [one["task"] for one in found["incomplete"]] == ["VOC2007"]
    assert "row 4: image VOC2007/q3.png is missing" in found["incomplete"][0]["reason"]
    assert set(found["averages"].values()) == {None}


def test_a_corrupt_image_is_named(own: Path) -> None:
    (own / "eval_images/MSCOCO_t2i/t2.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    found = evaluate(tiny_model(), "mmeb-v1", own, tasks=["VOC2007", "MSCOCO_t2i"])
    assert [one["task"] for one in found["incomplete"]] == ["MSCOCO_t2i"]
    assert "t2.png" in found["incomplete"][0]["reason"]


def test_a_truncated_parquet_is_named(own: Path) -> None:
    path = annotation(own, "VOC2007")
    path.write_bytes(path.read_bytes()[:-200])
    found = evaluate(tiny_model(), "mmeb-v1", own, tasks=["VOC2007", "MSCOCO_t2i"])
    assert [one["task"] for one in found["incomplete"]] == ["VOC2007"]
    assert path.name in found["incomplete"][0]["reason"]
    checked = check_suite(V1, own, ["VOC2007", "MSCOCO_t2i", "NIGHTS"])
    assert [one.status for one in checked] == ["damaged", "ready", "missing"]
    assert any("MMEB-eval" in line for line in fetch_commands(V1, own, checked))


def test_an_empty_list_of_candidates_is_named(own: Path) -> None:
    path = annotation(own, "VOC2007")
    rows = parquet.read_table(path).to_pylist()
    rows[1]["tgt_text"] = []
    files.write_parquet(path, rows)
    found = evaluate(tiny_model(), "mmeb-v1", own, tasks=["VOC2007"])
    assert "row 2: its list of candidates tgt_text is empty" in found["incomplete"][0]["reason"]


def test_a_vector_that_is_not_finite_is_named(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    real = type(model).embed

    def overflowing(self: Any, items: Any, **settings: Any) -> np.ndarray:
        vectors = real(self, items, **settings)
        vectors[[i for i, item in enumerate(items) if "label 2" in item.text]] = np.nan
        return vectors

    monkeypatch.setattr(type(model), "embed", overflowing)
    found = evaluate(model, "mmeb-v1", own, tasks=["VOC2007"])
    assert found["tasks"]["VOC2007"]["n"] == 0 and "hit@1" not in found["tasks"]["VOC2007"]
    assert "not finite" in found["incomplete"][0]["reason"]


def test_labels_outside_the_corpus_are_named(v2: Path, tmp_path: Path) -> None:
    task = V2.tasks["ViDoRe_arxivqa"]
    folder = "visdoc-tasks/data/" + task.get("folders")[0]
    shutil.copytree(v2 / folder, tmp_path / folder)
    path = next((tmp_path / folder / "qrels").iterdir())
    rows = parquet.read_table(path).to_pylist()
    rows[3]["corpus-id"] = 99
    rows.append({"query-id": 77, "corpus-id": 1, "score": 1})
    files.write_parquet(path, rows)
    data = beir.read(task, tmp_path)
    assert {problem.record: problem.message for problem in data.problems} == {
        "query 3": "its page 99 is not in the corpus",
        "qrels of 77": "there is no query with this id",
    }
    found = evaluate(tiny_model(), "mmeb-v2", tmp_path, tasks=[task.name])
    assert found["tasks"][task.name]["n"] == 5 and found["incomplete"]


def test_pages_missing_in_the_folder_come_from_the_corpus(v2: Path) -> None:
    task = V2.tasks["ViDoRe_docvqa"]
    folder = v2 / "visdoc-tasks" / task.name
    files.save(folder / "2.png", 3)
    try:
        data = beir.read(task, v2)
    finally:
        shutil.rmtree(folder)
    assert data.notes["pages from the corpus"] == 5
    assert data.candidates[2].visuals[0].source == folder / "2.png"


def test_a_leaderboard_file_with_strings_is_read(tmp_path: Path) -> None:
    board = {
        "metrics": {
            "video": {"K700": {"hit@1": 0.4}, "MSVD": "FILE_N/A", "MomentSeeker_1k8": {"hit@1": 1}},
            "visdoc": {"ViDoSeek-page": {"ndcg_linear@5": 0.1}, "MMLongBench-doc": "DIR_N/A"}
            | {"ViDoSeek-page-fixed": {"ndcg_linear@5": 0.8}},
        }
    }
    path = files.write_json(tmp_path / "a.json", board)
    assert read_leaderboard(path, V2) == {"K700": 0.4, "ViDoSeek-page": 0.8}


# --- caches and ties ------------------------------------------------------------------------------


def test_a_second_run_embeds_nothing_and_gives_the_same(v1: Path, tmp_path: Path) -> None:
    options = Options(output=tmp_path)
    runs = [
        evaluate(tiny_model(), "mmeb-v1", v1, tasks=["CIRR", "VOC2007"], options=options)
        for _ in range(2)
    ]
    assert [run["tasks"]["CIRR"]["info"]["embedded"] for run in runs] == [10, 0]
    assert runs[0]["tasks"]["CIRR"]["mrr@10"] == runs[1]["tasks"]["CIRR"]["mrr@10"]
    other = evaluate(tiny_model(1), "mmeb-v1", v1, tasks=["CIRR"], options=options)
    assert other["tasks"]["CIRR"]["info"]["embedded"] == 10  # another model is another key
    plain = evaluate(tiny_model(), "mmeb-v1", v1, tasks=["CIRR"])
    assert plain["tasks"]["CIRR"]["mrr@10"] == runs[0]["tasks"]["CIRR"]["mrr@10"]


def test_ties_are_reported_and_switchable(v1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    constant = np.ones(model.embedding_dim, np.float32) / np.sqrt(model.embedding_dim)
    monkeypatch.setattr(
        type(model), "embed", lambda self, items, **_: np.tile(constant, (len(items), 1))
    )
    strict = evaluate(model, "mmeb-v1", v1, tasks=["VOC2007"])["tasks"]["VOC2007"]
    assert strict["hit@1"] == 0
    assert strict["info"]["ties"] == {"queries": 5, "hit@1, ties broken by order": 1.0}
    official = evaluate(model, "mmeb-v1", v1, tasks=["VOC2007"], options=Options(ties="official"))
    assert official["tasks"]["VOC2007"]["hit@1"] == 1  # the right candidate stands first


def test_official_compat_merges_candidates_that_share_an_image(v2: Path, tmp_path: Path) -> None:
    task = V1.tasks["WebQA"]
    shutil.copytree(v2 / "image-tasks" / "WebQA", tmp_path / "image-tasks/WebQA")
    rows = files.image_rows(task, tmp_path / "image-tasks", instruct=True)
    for row in rows:
        row["tgt_img_path"][1] = row["tgt_img_path"][2]
    files.write_parquet(tmp_path / "MMEB_Test_Instruct/WebQA/test-0.parquet", rows)
    ours = mmeb_image.read(task, tmp_path)
    theirs = mmeb_image.read(task, tmp_path, compat="official")
    assert len(ours.candidates) > len(theirs.candidates)
    assert ours.pools and theirs.pools and len(ours.pools[0]) == 5 and len(theirs.pools[0]) == 4
