"""Running a task of questions: read, ask, score by both rules, write the submission."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from visavis.evaluate.items import SHOWN_FAILURES, data_fingerprint, thumbnails
from visavis.evaluate.results import TaskResult
from visavis.evaluate.suite import Task
from visavis.evaluate.vectors import ALONE, Workers
from visavis.evaluate.vqa.answers import Rules
from visavis.evaluate.vqa.ask import ask_all
from visavis.evaluate.vqa.data import Question, VqaData
from visavis.evaluate.vqa.judge import Judge, JudgeError, grade, http_judge
from visavis.evaluate.vqa.scores import SCORERS, Outcome, answered
from visavis.evaluate.vqa.submissions import WRITERS

if TYPE_CHECKING:
    from visavis.api import Model

MAX_NEW_TOKENS = 128


def run_vqa(
    model: Model,
    data: VqaData,
    task: Task,
    *,
    compat: str = "corrected",
    judge: Judge | None = None,
    output: Path | None = None,
    workers: Workers = ALONE,
    progress: Callable[[int], None] = lambda done: None,
) -> TaskResult | None:
    """Return a task's result; None in processes other than the first.

    Args:
        compat: the rules of the table; scores by the other ones are given where they differ.
        judge: grades MM-Vet's answers; None: they are only written for its evaluator.
        output: keeps answers and submissions.
    """
    started = time.perf_counter()
    asked = [question for question in data.questions if question.truth.get("asked", True)]
    answers, bad = ask_all(
        model,
        asked,
        max_new_tokens=task.get("max_new_tokens", MAX_NEW_TOKENS),
        folder=output / "answers" / task.name if output else None,
        workers=workers,
        progress=progress,
    )
    if workers.rank:
        return None
    answers |= {q.id: "" for q in data.questions if not q.truth.get("asked", True)}
    seconds = {"answer": round(time.perf_counter() - started, 2)}
    result = TaskResult(task.metric)
    result.problems = [vars(problem) for problem in data.problems]
    result.problems += [{"record": f"question {k}", "message": v} for k, v in bad.items()]
    usable = [question for question in data.questions if question.id in answers]
    if task.get("scorer") == "mmvet":
        outcome, other = _judged(usable, answers, judge, result), None
    else:
        other_rules: Rules = "official" if compat == "corrected" else "corrected"
        scorer = SCORERS[task.get("scorer")]
        outcome = scorer(usable, answers, compat)  # type: ignore[arg-type]
        other = scorer(usable, answers, other_rules)
    _fill(result, usable, answers, outcome)
    if other is not None:
        differing = {
            name: value
            for name, value in other.scores.items()
            if value != outcome.scores.get(name) and np.isfinite(value)
        }
        if compat == "corrected":
            result.official = differing
        elif differing:
            result.info["corrected"] = differing
    result.info |= {"data": data_fingerprint(data.sources), **data.notes, "seconds": seconds}
    writer = task.get("submission")
    if output and writer:
        suffix, write = WRITERS[writer]
        path = output / "submissions" / f"{task.name}{suffix}"
        write(data, answers, path)
        result.info["submission"] = str(path)
    return result


def _fill(
    result: TaskResult,
    questions: Sequence[Question],
    answers: Mapping[str, str],
    outcome: Outcome,
) -> None:
    result.scores = {k: float(v) for k, v in outcome.scores.items() if np.isfinite(v)}
    if result.headline not in result.scores and "answered" in result.scores:
        result.headline = "answered"
    result.values, result.intervals = outcome.values, outcome.intervals
    result.n, result.ids = len(questions), [question.id for question in questions]
    if any(len(values) != len(result.ids) for values in result.values.values()):
        known = [question for question in questions if question.truth["answer"]]
        result.ids = list(dict.fromkeys(question.truth["index"] for question in known))
        result.n, result.info["questions asked"] = len(result.ids), len(questions)
    parsed = outcome.parsed or [""] * len(questions)
    failures = 0
    for number, (question, found) in enumerate(zip(questions, parsed, strict=True)):
        values = result.values.get(result.headline, ())
        wrong = number < len(values) and values[number] < 1
        failures += wrong
        truth = {k: v for k, v in question.truth.items() if k != "row"}
        result.samples.append(
            {
                "id": question.id,
                "query": _shown(question, small=wrong and failures <= SHOWN_FAILURES),
                "answer": answers[question.id],
                "parsed": found,
                "expected": truth.get("answer", truth.get("answers", truth.get("label"))),
            }
        )


def _shown(question: Question, *, small: bool) -> dict[str, Any]:
    paths = [str(i.source) for i in question.images if isinstance(i.source, Path)]
    copies = thumbnails(question.images) if small else []
    found: dict[str, Any] = {"text": question.text, "images": paths}
    return found | ({"thumbnails": copies} if copies else {})


def _judged(
    questions: Sequence[Question],
    answers: Mapping[str, str],
    judge: Judge | None,
    result: TaskResult,
) -> Outcome:
    if judge is None:
        result.info["judge"] = "none; the answers are for MM-Vet's own evaluator"
        return answered(questions, answers, "corrected")
    values: list[float] = []
    parsed: list[str] = []
    capabilities: dict[str, list[float]] = {}
    for question in questions:
        label = question.truth.get("label")
        if not label:
            result.problems.append(
                {"record": f"question {question.id}", "message": "mm-vet.json has no answer to it"}
            )
            values.append(float("nan"))
            parsed.append("")
            continue
        asked = label.get("question", question.text)
        try:
            value = grade(judge, asked, str(label["answer"]), answers[question.id])
        except JudgeError as error:
            result.problems.append({"record": f"question {question.id}", "message": str(error)})
            values.append(float("nan"))
            parsed.append("")
            continue
        values.append(value)
        parsed.append(f"{value:g}")
        for name in set(label.get("capability", [])):
            capabilities.setdefault(name, []).append(value)
    graded = np.array(values)
    known = graded[np.isfinite(graded)]
    scores = {"score": float(known.mean())} if len(known) else {}
    scores |= {name: float(np.mean(found)) for name, found in sorted(capabilities.items())}
    return Outcome(scores, {"score": known} if len(known) == len(graded) else {}, parsed)


def judge_of(extra: Mapping[str, Any]) -> Judge | None:
    """Return the judge that options name, or None.

    `extra` holds `judge`, an address or a function of a prompt, and `judge_model`; the key for an
    address is read from the environment variable VISAVIS_JUDGE_KEY.
    """
    judge = extra.get("judge")
    if judge is None or callable(judge):
        return judge
    key = os.environ.get("VISAVIS_JUDGE_KEY", "")
    return http_judge(str(judge), str(extra.get("judge_model") or "gpt-4"), key=key)
