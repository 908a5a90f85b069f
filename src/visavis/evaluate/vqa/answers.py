"""Answers as they are compared: normalisers and parsers, each by the official or a corrected rule.

Where a rule of an original is a mistake, `rules="official"` keeps it and "corrected" mends it; the
docstrings say what differs. Answers are matched as words, never as parts of words.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Literal

Rules = Literal["official", "corrected"]

_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = (*';/[]"{}()=+\\_-><@`,?!',)
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
_PERIOD = re.compile(r"\.(?!\d)")
_OFFICIAL_PERIODS = 32  # re.UNICODE, given as the number of replacements


@cache
def _contractions(rules: Rules) -> Mapping[str, str]:
    text = resources.files(__package__).joinpath("contractions.txt").read_text("utf-8")
    pairs = dict(line.split() for line in text.splitlines() if not line.startswith("#"))
    if rules == "corrected":
        del pairs["somebody'd"]
        pairs["somebodyd"] = "somebody'd"
    return pairs


def normalise(text: str, rules: Rules = "corrected") -> str:
    """Return an answer as VQAv2, TextVQA and VizWiz compare it (EvalAI's answer processor).

    Lower case; commas and question marks dropped; punctuation dropped where it stands beside a
    blank or the text has a number with a comma, else replaced by a blank; full stops dropped unless
    a digit follows; number words to digits; articles dropped; contractions with apostrophes. The
    official rule drops at most 32 full stops and turns "somebody'd" into "somebodyd".
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    found = text
    drop_all = _COMMA_IN_NUMBER.search(text) is not None
    for mark in _PUNCTUATION:
        beside_blank = mark + " " in text or " " + mark in text
        found = found.replace(mark, "" if beside_blank or drop_all else " ")
    found = _PERIOD.sub("", found, count=_OFFICIAL_PERIODS if rules == "official" else 0)
    words = [_NUMBERS.get(word, word) for word in found.lower().split()]
    contractions = _contractions(rules)
    return " ".join(contractions.get(word, word) for word in words if word not in _ARTICLES)


def soft_accuracy(answer: str, truths: Sequence[str], rules: Rules = "corrected") -> float:
    """Return VQA's accuracy of an answer given those of ten people, from 0 to 1.

    The mean, over each person left out, of min(1, people who gave the answer among the others / 3).
    """
    own = normalise(answer, rules)
    counts = [normalise(truth, rules) == own for truth in truths]
    total = sum(counts)
    return sum(min(1.0, (total - one) / 3) for one in counts) / len(counts)


def plain(text: str) -> str:
    """Return an answer in lower case, without outer blanks and full stops, with single blanks."""
    return re.sub(r"\s+", " ", text.strip().lower().rstrip(".")).strip()


def has_words(answer: str, wanted: str) -> bool:
    """Return whether an answer holds the words of another one, in order and side by side.

    Example:
        has_words("It is a red apple.", "Apple")    True
        has_words("a pineapple", "apple")           False
    """
    words, own = _words(wanted), _words(answer)
    size = len(words)
    return bool(words) and any(own[i : i + size] == words for i in range(len(own) - size + 1))


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.lower())


def letter(answer: str, letters: Collection[str], rules: Rules = "corrected") -> str:
    """Return the letter of an option that an answer names, or "" where it names none.

    A bare letter, "B. text", or "The answer is B". The official rule of ScienceQA needs one more
    character after the last of these ("The answer is B" alone fails) and takes any capital letter;
    the corrected one also takes "(B)", "B)" and "B:".
    """
    if rules == "official":
        if answer in letters:
            return answer
        if len(answer) >= 3 and answer[0] in letters and answer[1:3] == ". ":
            return answer[0]
        found = re.findall(r"The answer is ([A-Z]).", answer)
        return found[0] if len(found) == 1 else ""
    text = answer.strip()
    if match := re.match(r"\(?([A-Z])(?:[).:](?:\s|$)|$)", text):
        return match[1] if match[1] in letters else ""
    found = re.findall(r"[Tt]he answer is \(?([A-Z])\b", text)
    return found[0] if len(found) == 1 and found[0] in letters else ""


def pope(answer: str, rules: Rules = "corrected") -> str:
    """Return "yes" or "no" as POPE's evaluation takes an answer.

    "no" where the first sentence has "no" or "not" as a word, else "yes". The official rule splits
    at single blanks and knows "No", "no" and "not" only, so that "NO", "no!" and "No\\n" are yes.
    """
    sentence = answer.split(".")[0] if "." in answer else answer
    if rules == "official":
        words: Collection[str] = sentence.replace(",", "").split(" ")
        return "no" if {"No", "not", "no"} & set(words) else "yes"
    return "no" if {"no", "not"} & set(_words(sentence)) else "yes"


def mme(answer: str, rules: Rules = "corrected") -> str:
    """Return "yes", "no" or "other" as MME's tool takes an answer.

    The official rule looks for "yes" and "no" anywhere in the first four characters, so that "nob"
    is no; the corrected one takes the first word.
    """
    text = answer.lower()
    if rules == "official":
        if text in ("yes", "no"):
            return text
        start = text[:4]
        return "yes" if "yes" in start else "no" if "no" in start else "other"
    words = _words(text)
    return words[0] if words and words[0] in ("yes", "no") else "other"


def mmmu_choice(answer: str, choices: Sequence[str], texts: Mapping[str, str]) -> str:
    """Return the letter that MMMU's parser finds in an answer, or "" where it would draw one.

    "(A)", else " A ", else the text of an option in an answer of more than five words; of several,
    the one that stands last.
    """
    for mark in (",", ".", "!", "?", ";", ":", "'"):
        answer = answer.strip(mark)
    answer = f" {answer} "
    for form in ("({})", " {} "):
        found = [choice for choice in choices if form.format(choice) in answer]
        if found:
            return max(found, key=lambda choice: answer.rfind(form.format(choice)))
    if len(answer.split()) > 5:
        low = answer.lower()
        found = [choice for choice, text in texts.items() if text.lower() in low]
        if found:
            return max(found, key=lambda choice: low.rfind(texts[choice].lower()))
    return ""


_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBER_FORMS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def mmmu_open(answer: str, truths: Sequence[str], rules: Rules = "corrected") -> bool:
    """Return whether an answer to an open question of MMMU is right.

    Looks at what follows words such as "is" and "therefore", and at numbers. The official rule
    finds a true answer inside other words ("cat" in "catalogue"); the corrected one compares words.
    """
    wanted = [value for truth in truths for value in _mmmu_values(truth)]
    for value in {v for part in _mmmu_parts(answer) for v in _mmmu_values(part)}:
        if isinstance(value, float):
            if value in wanted:
                return True
        elif rules == "official":
            if any(isinstance(one, str) and one in value for one in wanted):
                return True
        elif any(isinstance(one, str) and has_words(value, one) for one in wanted):
            return True
    return False


def _mmmu_parts(answer: str) -> list[str]:
    """Return the shortest tail after a key word of each line, and the numbers in them."""
    answer = answer.strip().strip(".").lower()
    lines = re.split(r"\.\s(?=[A-Z])|\n", answer)
    found = []
    for number, line in enumerate(lines):
        keys = (*_KEYS, "=") if number == len(lines) - 1 else _KEYS
        tails = [line.split(key)[-1].strip() for key in keys if key in line]
        tail = _shortest(tails)
        if tail and tail not in (":", ",", ".", "!", "?", ";", "'"):
            found.append(tail)
    parts = found or [answer]
    numbers = [n for part in parts for form in _NUMBER_FORMS for n in re.findall(form, part)]
    return parts + numbers


def _shortest(tails: Sequence[str]) -> str:
    """Return the shortest tail; an empty one gives way to the next, as in the original."""
    best = ""
    for tail in tails:
        if not best or len(tail) < len(best):
            best = tail
    return best


def _mmmu_values(text: str) -> list[str | float]:
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        low = text.lower()
        return [f" {low}", f"{low} "] if len(low) == 1 else [low]
