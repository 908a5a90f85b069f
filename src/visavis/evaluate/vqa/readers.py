"""Questions from the files of LLaVA's `playground/data/eval` and TinyLLaVA's variants of it.

Question files hold whole prompts with their suffixes; MMBench, ScienceQA and MMMU hold parts that
are put together as LLaVA's scripts do.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from visavis.errors import InputError
from visavis.evaluate.items import MissingFilesError, Problem
from visavis.evaluate.readers import records
from visavis.evaluate.readers.mmeb_image import ImageFinder
from visavis.evaluate.suite import Task
from visavis.evaluate.tables import find_first, iterate_rows
from visavis.evaluate.vqa.data import Question, VqaData
from visavis.inputs import Image

LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CN = "请直接回答选项字母。"
HOMES = ("", "playground/data/eval/", "eval/")
Row = dict[str, Any]


def read(task: Task, root: Path) -> VqaData:
    """Return the questions of a task with what is right.

    Raises:
        MissingFilesError: the question file or the labels are not there.
        InputError: they are damaged.
    """
    return unique(READERS[task.reader](task, root))


def unique(data: VqaData) -> VqaData:
    """Return questions without those whose id an earlier one has; they become problems."""
    seen: set[str] = set()
    kept = []
    for question in data.questions:
        if question.id in seen:
            data.problems.append(Problem(f"question {question.id}", "this id stands twice"))
            continue
        seen.add(question.id)
        kept.append(question)
    data.questions = kept
    return data


def locate(
    task: Task, root: Path, name: str = "questions", *, optional: bool = False
) -> list[Path]:
    """Return the files of one of a task's options, in any of the layouts.

    Raises:
        MissingFilesError: there are none, and they are needed.
    """
    patterns = task.get(name, [])
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = find_first(root, [home + pattern for pattern in patterns for home in HOMES])
    if not found and not optional:
        raise MissingFilesError(
            f"{' or '.join(patterns)} is missing below {root}; see --check for where it comes from"
        )
    return found


def _images(task: Task, root: Path) -> ImageFinder:
    folders = task.get("images", [""])
    folders = [folders] if isinstance(folders, str) else folders
    return ImageFinder(root, [home + folder for folder in folders for home in HOMES])


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot read {path}: {error}; the file is cut off, copy it again"
        ) from error


def _each(data: VqaData, files: list[Path], make: Callable[[Row], Question | None]) -> VqaData:
    """Fill the questions from rows; a row that cannot be used becomes a problem."""
    data.sources += files
    for number, row in enumerate(iterate_rows(files)):
        try:
            question = make(row)
            if question is not None:
                data.questions.append(question)
        except (InputError, KeyError, ValueError, TypeError, IndexError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            data.problems.append(Problem(f"{files[0].name}, record {number + 1}", reason))
    return data


def _asked(row: Row, find: ImageFinder, **truth: Any) -> Question:
    """Return a row of LLaVA's question files as a question."""
    images = (find.need(row["image"]),) if row.get("image") else ()
    return Question(str(row["question_id"]), row["text"], images, {"row": row, **truth})


def plain(task: Task, root: Path) -> VqaData:
    """VQAv2, VizWiz and MM-Vet: questions only; MM-Vet's answers, where its file is there."""
    find, data = _images(task, root), VqaData()
    truths: dict[str, Any] = {}
    if task.get("labels"):
        for path in locate(task, root, "labels", optional=True):
            truths = {str(key).removeprefix("v1_"): value for key, value in _json(path).items()}
            data.sources.append(path)
    for path in locate(task, root, "all_ids", optional=True):
        data.files["all_ids"] = path

    def make(row: Row) -> Question:
        name = str(row["question_id"]).removeprefix("v1_")
        if truths and name not in truths:
            raise InputError(f"question {name} has no answer in the file of answers")
        return _asked(row, find, label=truths.get(name))

    return _each(data, locate(task, root), make)


def gqa(task: Task, root: Path) -> VqaData:
    """GQA testdev_balanced with the answers of the official question file."""
    labels = locate(task, root, "labels")
    answers = {key: value["answer"] for key, value in _json(labels[0]).items()}
    find = _images(task, root)
    data = VqaData(sources=list(labels))

    def make(row: Row) -> Question:
        if str(row["question_id"]) not in answers:
            raise InputError(f"question {row['question_id']} has no answer in {labels[0].name}")
        return _asked(row, find, answer=answers[str(row["question_id"])])

    return _each(data, locate(task, root), make)


def textvqa(task: Task, root: Path) -> VqaData:
    """TextVQA 0.5.1, the answers found by image and question, with or without OCR tokens."""
    labels = locate(task, root, "labels")
    answers = {
        (row["image_id"], row["question"].lower()): row["answers"]
        for row in _json(labels[0])["data"]
    }
    find, data = _images(task, root), VqaData(sources=list(labels))
    with_ocr = bool(task.get("ocr", True))

    def make(row: Row) -> Question:
        lines = row["text"].split("\n")
        ocr = [line for line in lines if line.startswith("Reference OCR token: ")]
        question = next(line for line in lines if not line.startswith("Reference OCR token:"))
        known = answers.get((row["question_id"], question.lower()))
        if known is None:
            raise InputError(
                f"question {question!r} about {row['question_id']} has no answers in "
                f"{labels[0].name}"
            )
        text = row["text"]
        if not with_ocr:
            text = "\n".join(line for line in lines if line not in ocr)
        asked = _asked(row | {"text": text}, find, answers=known)
        number = len(data.questions)  # question_id is the image's, which several questions share
        return Question(f"{asked.id}#{number}", asked.text, asked.images, asked.truth)

    return _each(data, locate(task, root), make)


def scienceqa(task: Task, root: Path) -> VqaData:
    """ScienceQA test: all ids of the split count; one without a question is a problem."""
    split = locate(task, root, "split")[0]
    problems_file = locate(task, root, "labels")[0]
    ids, problems = _json(split)[task.get("part", "test")], _json(problems_file)
    find, wanted = _images(task, root), set(map(str, ids))
    data = VqaData(sources=[split, problems_file])

    def make(row: Row) -> Question | None:
        name = str(row["id"])
        if name not in wanted:
            return None
        problem = problems[name]
        text = row["conversations"][0]["value"].replace("<image>", "").strip()
        images = (find.need(row["image"]),) if row.get("image") else ()
        return Question(
            name,
            f"{text}\n{LETTER}",
            images,
            {
                "letters": "ABCDE"[: len(problem["choices"])],
                "answer": "ABCDE"[problem["answer"]],
                "has_image": bool(problem.get("image")),
            },
        )

    _each(data, locate(task, root), make)
    known = {question.id for question in data.questions}
    for name in map(str, ids):
        if name not in known and not any(name in p.record for p in data.problems):
            data.problems.append(Problem(f"problem {name}", "no usable question has this id"))
    return data


def pope(task: Task, root: Path) -> VqaData:
    """POPE: labels by category, matched by their order there and checked by image and text."""
    files = locate(task, root, "labels")
    labels = {
        path.stem.removeprefix("coco_pope_"): list(iterate_rows([path]))  # JSON lines
        for path in files
    }
    find, data = _images(task, root), VqaData(sources=list(files))
    places = dict.fromkeys(labels, 0)

    def make(row: Row) -> Question:
        category = row["category"]
        if category not in labels:
            raise InputError(f"category {category!r} has no file coco_pope_{category}.json")
        place = places[category]
        places[category] += 1
        if place >= len(labels[category]):
            raise InputError(f"coco_pope_{category}.json has {len(labels[category])} labels only")
        label = labels[category][place]
        if Path(label["image"]).name != Path(row["image"]).name:
            raise InputError(
                f"label {place + 1} of {category} is of {label['image']}, expected {row['image']}; "
                "the files are of different versions"
            )
        return _asked(row, find, label=label["label"], category=category)

    _each(data, locate(task, root), make)
    for category, lines in labels.items():
        if places[category] < len(lines):
            left = len(lines) - places[category]
            data.problems.append(Problem(f"category {category}", f"{left} labels have no question"))
    return data


def mme(task: Task, root: Path) -> VqaData:
    """MME: answers from the text files of the official release, two questions an image."""
    find, data = _images(task, root), VqaData()
    folders = [
        root / h / f for h in HOMES for f in task.get("images", []) if (root / h / f).is_dir()
    ]
    if not folders:
        raise MissingFilesError(f"{task.get('images')[0]} is missing below {root}")
    answers: dict[tuple[str, str, str], str] = {}
    for category in sorted(f for f in folders[0].iterdir() if f.is_dir()):
        inside = category / "questions_answers_YN"
        for path in sorted((inside if inside.is_dir() else category).glob("*.txt")):
            data.sources.append(path)
            for line in path.read_text(encoding="utf-8").splitlines():
                question, tab, answer = line.strip().partition("\t")
                if tab:
                    answers[category.name, path.stem, _mme_question(question)] = (
                        answer.strip().lower()
                    )

    seen: set[str] = set()

    def make(row: Row) -> Question | None:
        category, stem = row["question_id"].split("/")[0], Path(row["question_id"]).stem
        answer = answers.get((category, stem, _mme_question(row["text"])))
        if answer is None:
            raise InputError(f"{row['question_id']}: its question has no answer in the release")
        asked = _asked(row, find, answer=answer, category=category, image=row["question_id"])
        name = f"{asked.id}#{_mme_question(row['text'])}"
        if name in seen:  # LLaVA's file repeats some, and its converter keeps the first
            data.notes["repeated questions"] = data.notes.get("repeated questions", 0) + 1
            return None
        seen.add(name)
        return Question(name, asked.text, asked.images, asked.truth)

    return _each(data, locate(task, root), make)


def _mme_question(text: str) -> str:
    """Return a question of MME without the sentences that ask for a form of answer."""
    for suffix in (
        "Answer the question using a single word or phrase.",
        "Please answer yes or no.",
    ):
        text = text.replace(suffix, "")
    return " ".join(text.split())


def mmbench(task: Task, root: Path) -> VqaData:
    """MMBench's table; with `circular`, each question once for every rotation of its options."""
    files = locate(task, root)
    suffix = LETTER_CN if task.get("language") == "cn" else LETTER
    data = VqaData(files={"table": files[0]})
    rounds = bool(task.get("circular", False))
    data.sources += files
    for row in iterate_rows(files):
        name = str(row["index"])
        try:
            options = []
            for option in "ABCD":
                if _empty(row.get(option)):
                    break
                options.append(row[option])
            if not options:
                raise InputError("it has no options")
            image = Image(base64.b64decode(row["image"], validate=True))
            answer = "" if _empty(row.get("answer")) else row["answer"].strip()
            if answer and answer not in "ABCD"[: len(options)]:
                raise InputError(f"its answer {answer!r} is none of its {len(options)} options")
            start = (
                row["question"] if _empty(row.get("hint")) else f"{row['hint']}\n{row['question']}"
            )
            for turn in range(len(options) if rounds else 1):
                turned = options[turn:] + options[:turn]
                lines = [f"{mark}. {text}" for mark, text in zip("ABCD", turned, strict=False)]
                data.questions.append(
                    Question(
                        f"{name}/{turn}" if rounds else name,
                        "\n".join([start, *lines, suffix]),
                        (image,),
                        {
                            "index": name,
                            "answer": "ABCD"[("ABCD".index(answer) - turn) % len(options)]
                            if answer
                            else "",
                            "letters": "ABCD"[: len(options)],
                            "category": row.get("category") or "",
                        },
                    )
                )
        except (InputError, binascii.Error, ValueError, KeyError, TypeError) as error:
            data.problems.append(Problem(f"index {name}", str(error)))
    return data


def _empty(value: Any) -> bool:
    return value is None or str(value).strip().lower() in ("", "nan", "none")


def seed(task: Task, root: Path) -> VqaData:
    """SEED-Bench: answers and types of the official file."""
    labels = locate(task, root, "labels")
    official = _json(labels[0])
    names = {number: name for name, number in official["question_type"].items()}
    known = {str(row["question_id"]): row for row in official["questions"]}
    find, data = _images(task, root), VqaData(sources=list(labels))

    def make(row: Row) -> Question:
        label = known.get(str(row["question_id"]))
        if label is None:
            raise InputError(f"question {row['question_id']} is not in {labels[0].name}")
        return _asked(
            row,
            find,
            answer=label["answer"],
            type=names[label["question_type_id"]],
            kind=label["data_type"],
        )

    _each(data, locate(task, root), make)
    missing = set(known) - {question.id for question in data.questions}
    data.problems += [Problem(f"question {name}", "is not asked") for name in sorted(missing)]
    return data


def mmmu(task: Task, root: Path) -> VqaData:
    """MMMU's validation set as TinyLLaVA prepares it; questions without an image of their own are
    about several images, which this layout does not hold."""
    labels = locate(task, root, "labels")
    answers = _json(labels[0])
    find, data = _images(task, root), VqaData(sources=list(labels))

    def make(row: Row) -> Question:
        name = str(row["id"])
        if name not in answers:
            raise InputError(f"question {name} has no answer in {labels[0].name}")
        if not row.get("image"):
            data.notes["questions about several images"] = (
                data.notes.get("questions about several images", 0) + 1
            )
        truth = {
            "type": row["question_type"],
            "choices": row.get("all_choices") or [],
            "texts": row.get("index2ans") or {},
            "answer": answers[name]["ground_truth"],
            "category": "_".join(name.split("_")[1:-1]),
            "asked": bool(row.get("image")),
        }
        images = (find.need(row["image"]),) if row.get("image") else ()
        return Question(name, row["prompt"], images, truth)

    return _each(data, locate(task, root), make)


def _spread(task: Task, total: int) -> list[int]:
    """Return which of `total` records are used: at most `max_records`, evenly spread."""
    limit = task.get("max_records", total)
    return [int(i * total / limit) for i in range(limit)] if limit < total else list(range(total))


def records_questions(task: Task, root: Path) -> VqaData:
    """Questions of one of nano's data sets, with short answers."""
    found, sources = records.load(task, root)
    asked = [(r, q, a) for r in found for q, a in r.questions]
    data = VqaData(sources=sources)
    for number in _spread(task, len(asked)):
        record, question, answer = asked[number]
        images = (Image(record.image),)
        data.questions.append(
            Question(f"{record.key}#{number}", question, images, {"answer": answer})
        )
    return data


def records_chat(task: Task, root: Path) -> VqaData:
    """Images of one of nano's data sets, asked for what they show."""
    found, sources = records.load(task, root)
    data = VqaData(sources=sources)
    for number in _spread(task, len(found)):
        record = found[number]
        truth = {"answer": record.label, "group": record.group}
        data.questions.append(
            Question(record.key, task.get("question"), (Image(record.image),), truth)
        )
    return data


READERS: dict[str, Callable[[Task, Path], VqaData]] = {
    "plain": plain,
    "gqa": gqa,
    "textvqa": textvqa,
    "scienceqa": scienceqa,
    "pope": pope,
    "mme": mme,
    "mmbench": mmbench,
    "seed": seed,
    "mmmu": mmmu,
    "records-questions": records_questions,
    "records-chat": records_chat,
}
