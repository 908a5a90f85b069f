"""Scores of answers, task by task, by the official or the corrected rules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from visavis.evaluate.metrics import interval
from visavis.evaluate.vqa import answers as parse
from visavis.evaluate.vqa.answers import Rules
from visavis.evaluate.vqa.data import Question

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


@dataclass
class Outcome:
    """Scores of a task.

    Args:
        scores: metric → value.
        values: each question's, of metrics that are means over all questions.
        parsed: what each answer was taken for.
        intervals: of scores that are no means over questions.
    """

    scores: dict[str, float]
    values: dict[str, np.ndarray] = field(default_factory=dict)
    parsed: list[str] = field(default_factory=list)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)


Answers = Mapping[str, str]
Scorer = Callable[[Sequence[Question], Answers, Rules], Outcome]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _grouped(
    questions: Sequence[Question], values: Sequence[float], by: str, prefix: str = ""
) -> dict[str, float]:
    groups: dict[str, list[float]] = defaultdict(list)
    for question, value in zip(questions, values, strict=True):
        groups[str(question.truth[by])].append(value)
    return {f"{prefix}{name}": _mean(found) for name, found in groups.items()}


def answered(questions: Sequence[Question], answers: Answers, rules: Rules) -> Outcome:
    """The share of questions with an answer, for sets that only a server can score."""
    parsed = [parse.normalise(answers[q.id], rules) for q in questions]
    values = [float(bool(text)) for text in parsed]
    return Outcome({"answered": _mean(values)}, {"answered": np.array(values)}, parsed)


def gqa(questions: Sequence[Question], answers: Answers, rules: Rules) -> Outcome:
    """GQA: exact match in lower case, without a full stop at the end."""
    if rules == "official":
        parsed = [answers[q.id].rstrip(".").lower() for q in questions]
    else:
        parsed = [parse.plain(answers[q.id]) for q in questions]
    values = [float(p == q.truth["answer"]) for p, q in zip(parsed, questions, strict=True)]
    return Outcome({"accuracy": _mean(values)}, {"accuracy": np.array(values)}, parsed)


def textvqa(questions: Sequence[Question], answers: Answers, rules: Rules) -> Outcome:
    """TextVQA: VQA's soft accuracy."""
    parsed = [parse.normalise(answers[q.id], rules) for q in questions]
    values = [parse.soft_accuracy(answers[q.id], q.truth["answers"], rules) for q in questions]
    return Outcome({"accuracy": _mean(values)}, {"accuracy": np.array(values)}, parsed)


def scienceqa(questions: Sequence[Question], answers: Answers, rules: Rules) -> Outcome:
    """ScienceQA: the letter; also over the questions with an image alone."""
    parsed = [
        parse.letter(answers[q.id], "ABCDE" if rules == "official" else q.truth["letters"], rules)
        for q in questions
    ]
    values = [float(p == q.truth["answer"]) for p, q in zip(parsed, questions, strict=True)]
    # Officially an image counts where the saved prompt has its token, that is where one was asked
    # about; where problems.json says so otherwise.
    shown = [bool(q.images) if rules == "official" else q.truth["has_image"] for q in questions]
    with_image = [value for value, has in zip(values, shown, strict=True) if has]
    return Outcome(
        {"img_accuracy": _mean(with_image), "accuracy": _mean(values)},
        {"accuracy": np.array(values)},
        parsed,
        {"img_accuracy": interval(np.array(with_image))},
    )


def pope(questions: Sequence[Question], answers: Answers, rules: Rules) -> Outcome:
    """POPE: F1 of "yes" in each category and their mean, as in LLaVA's table."""
    parsed = [parse.pope(answers[q.id], rules) for q in questions]
    scores: dict[str, float] = {}
    names = sorted({q.truth["category"] for q in questions})
    right: list[float] = []
    per_category: dict[str, np.ndarray] = {}
    for name in names:
        pairs = np.array(
            [
                (p == "yes", q.truth["label"] == "yes")
                for p, q in zip(parsed, questions, strict=True)
                if q.truth["category"] == name
            ]
        )
        per_category[name] = pairs
        scores |= {f"{key} {name}": value for key, value in binary(pairs).items()}
    right = [
        float((p == "yes") == (q.truth["label"] == "yes"))
        for p, q in zip(parsed, questions, strict=True)
    ]
    scores = {
        "f1": _mean([scores[f"f1 {name}"] for name in names]),
        "accuracy": _mean(right),
        "yes_ratio": _mean([float(p == "yes") for p in parsed]),
    } | scores
    return Outcome(
        scores,
        {"accuracy": np.array(right)},
        parsed,
        {"f1": _resampled(per_category, lambda pairs: binary(pairs)["f1"])},
    )


def binary(pairs: np.ndarray) -> dict[str, float]:
    """Return accuracy, precision, recall, f1 and yes_ratio of bool [N, 2] predictions and labels;
    0 where a denominator is 0."""
    said, true = pairs[:, 0], pairs[:, 1]
    hits = int((said & true).sum())
    precision = hits / int(said.sum()) if said.any() else 0.0
    recall = hits / int(true.sum()) if true.any() else 0.0
    both = precision + recall
    return {
        "accuracy": float((said == true).mean()),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / both if both else 0.0,
        "yes_ratio": float(said.mean()),
    }


def _resampled(
    groups: Mapping[str, np.ndarray],
    statistic: Callable[[np.ndarray], float],
    combine: Callable[[list[float]], float] = _mean,
    resamples: int = 300,
) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a statistic combined over groups of records."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(resamples):
        drawn = [rows[rng.integers(0, len(rows), len(rows))] for rows in groups.values()]
        found.append(combine([statistic(rows) for rows in drawn]))
    low, high = np.percentile(found, (2.5, 97.5))
    return float(low), float(high)


def mme(questions: Sequence[Question], answers: Answers, rules: Rules) -> Outcome:
    """MME: accuracy plus share of images with both questions right, in points of 200 a category;
    perception is the sum of ten categories, cognition of four."""
    parsed = [parse.mme(answers[q.id], rules) for q in questions]
    values = [float(p == q.truth["answer"]) for p, q in zip(parsed, questions, strict=True)]
    images: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for question, value in zip(questions, values, strict=True):
        images[question.truth["category"]][question.truth["image"]].append(value)
    rows = {  # of each image: questions right, questions asked, both right
        name: np.array([(sum(v), len(v), float(all(v) and len(v) > 1)) for v in found.values()])
        for name, found in images.items()
    }

    def points(found: np.ndarray) -> float:
        return 100 * float(found[:, 0].sum() / found[:, 1].sum() + found[:, 2].mean())

    scores = {name: points(found) for name, found in rows.items()}
    totals = {
        total: sum(scores[name] for name in names if name in scores)
        for total, names in (("perception", PERCEPTION), ("cognition", COGNITION))
    }
    groups = {name: rows[name] for name in PERCEPTION if name in rows}
    bounds = {"perception": _resampled(groups, points, sum)} if groups else {}
    return Outcome(totals | scores, {"accuracy": np.array(values)}, parsed, bounds)


def mmbench(questions: Sequence[Question], answers: Answers, rules: Rules) -> Outcome:
    """MMBench's development set scored here by the letter; with rotations, an index counts where
    every round is right. Questions without a published answer are left to the server."""
    parsed = [parse.letter(answers[q.id], q.truth["letters"], "corrected") for q in questions]
    known = [(p, q) for p, q in zip(parsed, questions, strict=True) if q.truth["answer"]]
    if not known:
        return answered(questions, answers, rules)
    by_index: dict[str, list[bool]] = defaultdict(list)
    for found, question in known:
        by_index[question.truth["index"]].append(found == question.truth["answer"])
    values = np.array([float(all(rounds)) for rounds in by_index.values()])
    return Outcome({"accuracy": float(values.mean())}, {"accuracy": values}, parsed)


def seed(questions: Sequence[Question], answers: Answers, rules: Rules) -> Outcome:
    """SEED-Bench: the letter; the official rule takes an answer that is the letter and no more."""
    if rules == "official":
        parsed = [answers[q.id] for q in questions]
    else:
        parsed = [parse.letter(answers[q.id], "ABCD") for q in questions]
    values = [float(p == q.truth["answer"]) for p, q in zip(parsed, questions, strict=True)]
    scores = {"accuracy": _mean(values)}
    scores |= _grouped(questions, values, "kind", "accuracy ")
    scores |= _grouped(questions, values, "type")
    return Outcome(scores, {"accuracy": np.array(values)}, parsed)


def mmmu(questions: Sequence[Question], answers: Answers, rules: Rules) -> Outcome:
    """MMMU: where an answer names no option, the original draws one; here the official rule counts
    its expectation and the corrected one 0. The same holds for questions about several images,
    which are not asked."""
    parsed, values = [], []
    for question in questions:
        truth = question.truth
        if truth["type"] != "multiple-choice":
            parsed.append(answers[question.id])
            truths = truth["answer"] if isinstance(truth["answer"], list) else [truth["answer"]]
            right = truth["asked"] and parse.mmmu_open(answers[question.id], truths, rules)
            values.append(float(right))
            continue
        found = (
            parse.mmmu_choice(answers[question.id], truth["choices"], truth["texts"])
            if truth["asked"]
            else ""
        )
        parsed.append(found)
        drawn = 1 / len(truth["choices"]) if rules == "official" and not found else 0.0
        values.append(float(found == truth["answer"]) if found else drawn)
    scores = {"accuracy": _mean(values)} | _grouped(questions, values, "category")
    return Outcome(scores, {"accuracy": np.array(values)}, parsed)


def exact(questions: Sequence[Question], answers: Answers, rules: Rules) -> Outcome:
    """Exact match without case and full stop; also over yes/no questions and the others apart."""
    parsed = [parse.plain(answers[q.id]) for q in questions]
    truths = [parse.plain(q.truth["answer"]) for q in questions]
    values = [float(p == truth) for p, truth in zip(parsed, truths, strict=True)]
    polar = [truth in ("yes", "no", "true", "false") for truth in truths]
    scores = {"accuracy": _mean(values)}
    for name, wanted in (("yes/no", True), ("other", False)):
        some = [v for v, is_polar in zip(values, polar, strict=True) if is_polar == wanted]
        scores |= {f"accuracy {name}": _mean(some)} if some else {}
    return Outcome(scores, {"accuracy": np.array(values)}, parsed)


def names(questions: Sequence[Question], answers: Answers, rules: Rules) -> Outcome:
    """Answers that hold the class's name as words ("a pineapple" is no apple), or its group's."""
    parsed = [parse.plain(answers[q.id]) for q in questions]
    found = {
        metric: np.array([float(parse.has_words(answers[q.id], q.truth[key])) for q in questions])
        for metric, key in (("names_class", "answer"), ("names_group", "group"))
    }
    return Outcome({k: float(v.mean()) for k, v in found.items()}, found, parsed)


def choice(questions: Sequence[Question], answers: Answers, rules: Rules) -> Outcome:
    """Multiple choice: the letter, or the text of an option and no other's."""
    parsed = []
    for question in questions:
        options = question.truth["options"]
        found = parse.letter(answers[question.id], question.truth["letters"])
        said = [
            i for i, option in enumerate(options) if parse.has_words(answers[question.id], option)
        ]
        if not found and len(said) == 1:
            found = question.truth["letters"][said[0]]
        parsed.append(found)
    values = [float(p == q.truth["answer"]) for p, q in zip(parsed, questions, strict=True)]
    return Outcome({"accuracy": _mean(values)}, {"accuracy": np.array(values)}, parsed)


def short(questions: Sequence[Question], answers: Answers, rules: Rules) -> Outcome:
    """Short answers: exact match after VQA's normalisation with any of the right ones; `has_words`
    counts answers that hold a right one as words."""
    parsed = [parse.normalise(answers[q.id]) for q in questions]
    exactly, holding = [], []
    for found, question in zip(parsed, questions, strict=True):
        truths = question.truth["answers"]
        exactly.append(float(found in {parse.normalise(truth) for truth in truths}))
        holding.append(float(any(parse.has_words(answers[question.id], t) for t in truths)))
    values = {"accuracy": np.array(exactly), "has_words": np.array(holding)}
    return Outcome({k: float(v.mean()) for k, v in values.items()}, values, parsed)


SCORERS: dict[str, Scorer] = {
    "answered": answered,
    "gqa": gqa,
    "textvqa": textvqa,
    "scienceqa": scienceqa,
    "pope": pope,
    "mme": mme,
    "mmbench": mmbench,
    "seed": seed,
    "mmmu": mmmu,
    "exact": exact,
    "names": names,
    "choice": choice,
    "short": short,
}
