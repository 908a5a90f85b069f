"""VQA benchmarks: answers parsed as the originals do, and all of LLaVA's layout end to end."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.evaluate.official_files import write_json, write_jsonl
from tests.evaluate.vqa_files import write_vqa
from tests.fakes import tiny_model
from visavis.evaluate.check import check_suite
from visavis.evaluate.run import Options, evaluate
from visavis.evaluate.suite import load_suite
from visavis.evaluate.vqa import answers as parse
from visavis.evaluate.vqa import scores
from visavis.evaluate.vqa.data import Question
from visavis.evaluate.vqa.readers import read

VQA = load_suite("vqa")

# Printed by EvalAIAnswerProcessor of LLaVA@c121f04; 20,000 random answers were compared once.
NORMALISED = {
    "The U.S.A.": "usa",
    "1,000 dogs; cats": "1000 dogs cats",
    "it's ten o'clock": "it 's 10 o'clock",
    "hello-world": "hello world",
    "(B) and/or [c]": "b and or c",
    "somebody'd go": "somebodyd go",
    "youll see 2.5.": "you'll see 2.5",
    "None": "0",
    "What? No!": "what no",
    "a  the an": "",
    "dont\nstop": "don't stop",
    "x=3 , y=4": "x 3 y 4",
    "e.g. 5 %": "eg 5 %",
    "don't": "don't",
}


@pytest.mark.parametrize("text", NORMALISED)
def test_answers_are_normalised_as_evalai_does(text: str) -> None:
    assert parse.normalise(text, "official") == NORMALISED[text]


def test_what_the_corrected_normaliser_mends() -> None:
    assert parse.normalise("somebodyd go") == parse.normalise("somebody'd go") == "somebody'd go"
    dots = "." * 40 + "x"
    assert parse.normalise(dots) == "x" and parse.normalise(dots, "official") == "." * 8 + "x"


def test_soft_accuracy_is_vqas() -> None:
    truths = ["stop"] * 3 + ["go"] * 7
    assert parse.soft_accuracy("Stop.", truths) == pytest.approx(0.9)
    assert parse.soft_accuracy("go", truths) == 1
    assert parse.soft_accuracy("halt", truths) == 0


@pytest.mark.parametrize(
    ("answer", "official", "corrected"),
    [
        ("B", "B", "B"),
        ("B. that", "B", "B"),
        ("The answer is B.", "B", "B"),
        ("The answer is B", "", "B"),
        ("(B)", "", "B"),
        ("B) that", "", "B"),
        ("Both", "", ""),
        ("The answer is A. The answer is B.", "", ""),
        ("", "", ""),
    ],
)
def test_letters(answer: str, official: str, corrected: str) -> None:
    assert parse.letter(answer, "ABC", "official") == official
    assert parse.letter(answer, "ABC") == corrected


@pytest.mark.parametrize(
    ("answer", "official", "corrected"),
    [
        ("Yes.", "yes", "yes"),
        ("No, there is not.", "no", "no"),
        ("NO", "yes", "no"),
        ("no!", "yes", "no"),
        ("Nothing is there", "yes", "yes"),
        ("Yes. There is no doubt.", "yes", "yes"),
    ],
)
def test_pope_answers(answer: str, official: str, corrected: str) -> None:
    assert parse.pope(answer, "official") == official
    assert parse.pope(answer) == corrected


def test_mme_answers() -> None:
    assert [parse.mme(a, "official") for a in ("Yes", "nob", "I am")] == ["yes", "no", "other"]
    assert [parse.mme(a) for a in ("Yes, it is", "nob", "No.")] == ["yes", "other", "no"]


def test_words_are_matched_not_parts_of_words() -> None:
    assert parse.has_words("It is a red apple.", "Apple")
    assert not parse.has_words("a pineapple", "Apple")
    assert parse.has_words("an ice cream, please", "ice cream")
    assert not parse.has_words("nice creams", "ice cream")
    assert not parse.has_words("anything", "")
    assert parse.mmmu_open("it is in the catalogue", ["cat"], "official")
    assert not parse.mmmu_open("it is in the catalogue", ["cat"])


def test_mmmu_choices() -> None:
    texts = {"A": "a cat", "B": "a dog"}
    assert parse.mmmu_choice("(A) or rather (B)", "AB", texts) == "B"
    assert parse.mmmu_choice("The right one is A", "AB", texts) == "A"
    assert parse.mmmu_choice("I see that there is a dog here", "AB", texts) == "B"
    assert parse.mmmu_choice("a dog", "AB", texts) == ""


def test_mme_points_are_accuracy_and_pairs() -> None:
    """One image with both right, one with one of two: 75 + 50 points."""
    questions = [
        Question(f"{i}{j}", "", (), {"category": "count", "image": str(i), "answer": "yes"})
        for i in range(2)
        for j in range(2)
    ]
    answers = {"00": "Yes", "01": "yes", "10": "yes", "11": "no"}
    found = scores.mme(questions, answers, "official").scores
    assert found == {"perception": 125.0, "cognition": 0, "count": 125.0}


# --- end to end -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vqa(tmp_path_factory.mktemp("vqa") / "playground/data/eval").parents[2]


@pytest.fixture(scope="module")
def run(files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    output = tmp_path_factory.mktemp("run")
    return evaluate(tiny_model(), "vqa", files, options=Options(output=output)), output


def test_every_benchmark_runs(run: tuple[dict[str, Any], Path]) -> None:
    found, _ = run
    assert found["incomplete"] == [] and set(found["tasks"]) == set(VQA.tasks)
    assert found["tasks"]["MMBench-circular"]["n"] == 5
    assert found["tasks"]["MMBench-circular"]["info"]["questions asked"] == 16
    assert found["tasks"]["MME"]["info"]["repeated questions"] == 1
    assert found["tasks"]["MMMU"]["info"]["questions about several images"] == 1
    assert "official" in found["tasks"]["MMMU"]  # it draws letters, we do not


def test_submissions_have_the_servers_form(run: tuple[dict[str, Any], Path]) -> None:
    from openpyxl import load_workbook

    folder = run[1] / "submissions"
    vqav2 = json.loads((folder / "VQAv2.json").read_text())
    assert [row["question_id"] for row in vqav2] == list(range(1000, 1008))
    assert [row["answer"] for row in vqav2[6:]] == ["", ""]  # not asked
    vizwiz = json.loads((folder / "VizWiz.json").read_text())
    assert list(vizwiz[0]) == ["image", "answer"] and len(vizwiz) == 5
    assert json.loads((folder / "GQA.json").read_text())[0]["questionId"] == "20"
    assert set(json.loads((folder / "MM-Vet.json").read_text())) == {f"v1_{i}" for i in range(5)}
    sheet = load_workbook(folder / "MMBench.xlsx").active
    assert sheet is not None
    header, first = [[cell.value for cell in row] for row in list(sheet.rows)[:2]]
    assert header == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert first[0] == 200 and first[7] == "A" and isinstance(first[6], str)


def test_answers_are_kept_and_asked_once(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, options = tiny_model(), Options(output=tmp_path)
    first = evaluate(model, "vqa", files, tasks=["GQA", "SEED"], options=options)
    kept = tmp_path / "answers/GQA/answers-0.jsonl"
    lines = kept.read_text().splitlines()
    kept.write_text("\n".join(lines[:4]) + "\n" + lines[4][:20])  # killed in the middle of a line
    asked: list[int] = []
    real = type(model).chat_many

    def counting(self: Any, prompts: Any, **settings: Any) -> Any:
        asked.append(len(prompts))
        return real(self, prompts, **settings)

    monkeypatch.setattr(type(model), "chat_many", counting)
    second = evaluate(model, "vqa", files, tasks=["GQA", "SEED"], options=options)
    assert asked == [2]
    names = ("accuracy", "n", "interval")
    for task in ("GQA", "SEED"):
        assert [first["tasks"][task][n] for n in names] == [second["tasks"][task][n] for n in names]


def test_prompts_are_those_of_llavas_scripts(files: Path) -> None:
    def first(name: str, number: int = 0) -> str:
        return read(VQA.tasks[name], files).questions[number].text

    letter = "Answer with the option's letter from the given choices directly."
    assert first("ScienceQA") == (
        f"Context: N/A\nQuestion: Which one, 0?\nOptions: (A) this (B) that (C) none\n{letter}"
    )
    assert first("MMBench") == (
        f"Look at it.\nWhich one is it, 0?\nA. a cat\nB. a dog\nC. a cup\n{letter}"
    )
    assert first("MMBench", 1).startswith("Which one is it, 1?\nA.")
    assert first("MMBench-CN").endswith("\n请直接回答选项字母。")
    assert first("MMBench-circular", 1).split("\n")[2:5] == ["A. a dog", "B. a cup", "C. a cat"]
    assert "Reference OCR token" in first("TextVQA")
    assert "OCR" not in first("TextVQA-no-OCR")


def test_a_rotated_option_keeps_its_answer(files: Path) -> None:
    for question in read(VQA.tasks["MMBench-circular"], files).questions:
        base = next(
            q
            for q in read(VQA.tasks["MMBench"], files).questions
            if q.id == question.truth["index"]
        )

        def right(one: Question) -> str:
            lines = dict(line.split(". ", 1) for line in one.text.split("\n") if line[1:3] == ". ")
            return lines[one.truth["answer"]]

        assert right(question) == right(base)


# --- bad input ------------------------------------------------------------------------------------


def test_unknown_and_repeated_ids_are_named(files: Path, tmp_path: Path) -> None:
    root = tmp_path / "gqa"
    rows = [
        json.loads(line)
        for line in (files / "playground/data/eval/gqa/llava_gqa_testdev_balanced.jsonl").open()
    ]
    rows[1]["question_id"], rows[2]["question_id"] = "77", rows[3]["question_id"]
    write_jsonl(root / "llava_gqa_testdev_balanced.jsonl", rows)
    for name in ("data",):
        (root / name).symlink_to(files / "playground/data/eval/gqa" / name)
    found = evaluate(tiny_model(), "vqa", tmp_path, tasks=["GQA"])
    assert found["tasks"]["GQA"]["n"] == 4
    data = read(VQA.tasks["GQA"], tmp_path)
    assert {p.record: p.message for p in data.problems} == {
        "llava_gqa_testdev_balanced.jsonl, record 2": (
            "question 77 has no answer in testdev_balanced_questions.json"
        ),
        "question 23": "this id stands twice",
    }


def test_pope_labels_of_another_version_are_named(files: Path, tmp_path: Path) -> None:
    (tmp_path / "pope").mkdir()
    old = files / "playground/data/eval/pope"
    for name in ("llava_pope_test.jsonl", "val2014"):
        (tmp_path / "pope" / name).symlink_to(old / name)
    for path in (old / "coco").iterdir():
        rows = [json.loads(line) for line in path.open()]
        write_jsonl(tmp_path / "pope/coco" / path.name, rows[:1] + rows[2:])
    data = read(VQA.tasks["POPE"], tmp_path)
    assert any("different versions" in problem.message for problem in data.problems)


def test_a_truncated_file_is_named(files: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "MMMU/anns_for_eval.json", [])
    path = tmp_path / "MMMU/answer_dict_val.json"
    path.write_text('{"validation_Math_0": {"ground')
    checked = check_suite(VQA, tmp_path, ["MMMU", "GQA"])
    assert [one.status for one in checked] == ["damaged", "missing"]
    assert "answer_dict_val.json" in checked[0].problems[0]


class Grader(BaseHTTPRequestHandler):
    """An OpenAI-compatible judge: full marks for odd questions, words instead of a number once."""

    asked: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        self.asked.append(prompt)
        last = next(line for line in reversed(prompt.split("\n")) if " | " in line)
        odd = last.split("?")[0][-1] in "13"
        said = "well" if odd and "digit" not in prompt else "1.0" if odd else "0.5 because"
        reply = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def judge() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Grader)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_a_judge_grades_mmvet(files: Path, judge: str) -> None:
    options = Options(extra={"judge": judge, "judge_model": "any"})
    found = evaluate(tiny_model(), "vqa", files, tasks=["MM-Vet"], options=options)
    task = found["tasks"]["MM-Vet"]
    assert task["score"] == pytest.approx((2 * 1.0 + 3 * 0.5) / 5)
    assert task["math"] == 1.0 and task["rec"] == 0.5 and found["incomplete"] == []
    assert "0 <AND> -0" in Grader.asked[0]


def test_a_judge_that_is_down_is_named(files: Path) -> None:
    options = Options(extra={"judge": "http://127.0.0.1:9/v1", "judge_model": "any"})
    found = evaluate(tiny_model(), "vqa", files, tasks=["MM-Vet", "GQA"], options=options)
    assert [one["task"] for one in found["incomplete"]] == ["MM-Vet"]
    assert "gives no answer" in found["incomplete"][0]["reason"]
    assert found["tasks"]["GQA"]["n"] == 6
