"""A judge for MM-Vet: a language model behind an OpenAI-compatible address that grades answers."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from importlib import resources
from typing import TypeAlias

from visavis.errors import VisavisError

Judge: TypeAlias = Callable[[str], str]  # a prompt → what the judge says
TRIES = 5


class JudgeError(VisavisError):
    """The judge is down, or does not answer with a grade."""


def http_judge(url: str, model: str, *, key: str = "", timeout: float = 60.0) -> Judge:
    """Return a judge that is asked by `POST <url>/chat/completions`.

    Args:
        url: as "http://localhost:8000/v1".
        key: sent as a bearer token, where given.

    Raises:
        JudgeError: by the judge, where it cannot be reached or sends no answer.
    """
    address = url.rstrip("/") + "/chat/completions"

    def ask(prompt: str) -> str:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0.0,
            "max_tokens": 3,
        }
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                found = json.loads(reply.read(1 << 20))
            return str(found["choices"][0]["message"]["content"])
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise JudgeError(
                f"the judge at {address} gives no answer ({error}); start it, or give another "
                "--judge"
            ) from error

    return ask


def mmvet_prompt(question: str, truth: str, answer: str) -> str:
    """Return MM-Vet's grading prompt (its evaluator's few-shot table) for one answer."""
    text = resources.files(__package__).joinpath("mmvet_prompt.txt").read_text("utf-8")
    truth = truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return text + "\n" + " | ".join([question, truth, answer, ""])


def grade(judge: Judge, question: str, truth: str, answer: str) -> float:
    """Return an answer's grade from 0 to 1.

    A reply without a grade is asked for again, with the sentence that MM-Vet's evaluator adds; the
    original takes 0 after five such replies, here that is an error.

    Raises:
        JudgeError: the judge is down, or says no number from 0 to 1.
    """
    prompt, said = mmvet_prompt(question, truth, answer), ""
    for number in range(TRIES):
        more = "\nPredict the correctness of the answer (digit): " if number else ""
        said = judge(prompt + more)
        try:
            found = float(said.strip().split(" ")[0].strip())
        except ValueError:
            continue
        if 0 <= found <= 1:
            return found
    raise JudgeError(f"the judge says {said[:60]!r}, expected a number from 0 to 1")
