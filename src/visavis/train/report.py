"""`report.html` of a run: loss curves, what was trained, predictions. One file, no scripts.

Made from the files of the run's folder: recipe.json, log.jsonl, trained.json, samples.json. The
page loads nothing from the network and carries a content security policy that forbids it. The
layout is the jinja2 template `report.html` beside this file. `predict` makes what samples.json
holds: answers to a few samples and what queries retrieve. Samples that no step has drawn come
first.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor

from visavis.checkpoints.checkpoint import Checkpoint
from visavis.errors import VisavisError
from visavis.generate.engine import generate
from visavis.generate.sampling import Sampler, Sampling
from visavis.inputs import Image, Prompt
from visavis.model.pooling import pooled
from visavis.processing.images import content_hash, decode_image
from visavis.processing.prompt_encoder import PreparedPrompt
from visavis.train.gradcache import token_chunks
from visavis.train.metrics import read_log
from visavis.train.objectives import Task
from visavis.train.objectives.contrastive import ContrastiveTask, JointTask
from visavis.train.objectives.generative import GenerativeTask
from visavis.utils import jpeg_preview, write_atomically

WIDTH, HEIGHT = 520, 230  # of a curve's drawing
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 30  # its margins
MOST_POINTS = 500  # of a curve; more are averaged
SMOOTH_FROM = 24  # points from which a smoothed curve is drawn too
TABLE_ROWS = 24  # of a curve's numbers

Points = list[tuple[float, float]]


def write_report(out: Path) -> Path:
    """Write the report of the run in `out`; return its path."""
    recipe = json.loads((out / "recipe.json").read_text(encoding="utf-8"))
    log = read_log(out / "log.jsonl") if (out / "log.jsonl").is_file() else []
    trained, samples = _read(out / "trained.json"), _read(out / "samples.json")
    stages = []
    for stage in recipe["stages"]:
        name = stage["name"]
        lines = [line for line in log if line.get("stage") == name]
        stages.append(_stage(stage, lines, trained.get(name, []), samples.get(name, [])))
    here = Path(__file__).parent
    style = here.joinpath("report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(here),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        name=recipe["name"],
        style=style,
        policy=f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'",
        facts=_facts(recipe, log),
        stages=stages,
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=96),
    )
    with write_atomically(out / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return out / "report.html"


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _facts(recipe: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    steps = {line["stage"]: line["step"] for line in log if "step" in line}
    model = recipe["model"]
    return {
        "model": model["base"] or f"{model['language_model']} + {model['vision_tower']}",
        "steps": f"{sum(steps.values()):,}",
        "tokens": _short(sum(line.get("tokens", 0) for line in log)),
        "time": _duration(sum(line.get("seconds", 0.0) for line in log)),
        "precision": recipe["precision"],
        "seed": recipe["seed"],
    }


def _stage(
    stage: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    trained: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the template values of a stage."""
    curves = _curves([line for line in lines if "step" in line])
    return {
        "name": stage["name"],
        "kind": stage["kind"],
        "notices": dict.fromkeys(text for line in lines for text in line.get("problems", [])),
        "curves": [_curve(title, points, unit) for title, unit, points in curves],
        "trained": trained,
        "numeric": [
            column
            for column in (trained[0] if trained else ())
            if all(isinstance(row[column], int | float) for row in trained)
        ],
        "samples": _samples(samples),
    }


def _samples(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return samples by kind, each kind with a line on which of them were trained on."""
    groups = []
    for kind, title in (("answer", "Answers"), ("match", "What queries find first")):
        own = [sample for sample in samples if sample["kind"] == kind]
        if not own:
            continue
        drawn = sum(bool(sample["drawn"]) for sample in own)
        seen = {
            0: "No step has drawn them.",
            len(own): "Steps have drawn all of them: this shows what is remembered.",
        }.get(drawn, f"Steps have drawn {drawn} of these {len(own)}.")
        if "hits" in own[0]:
            one = own[0]
            seen += f" Right for {one['hits']} of {one['of']} queries among {one['among']} targets."
        groups.append({"title": title, "seen": seen, "samples": own})
    return groups


# ---- curves --------------------------------------------------------------------------------------


def _curves(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, Points]]:
    """Return (title, unit, points) of everything that is drawn."""
    curves = []
    for key, title, unit, factor in (
        ("loss", "{} loss", "", 1),
        ("rate", "learning rate of {}", "", 1),
        ("norm", "gradient norm of {}", "", 1),
        ("tokens_per_second", "speed", "tokens/s", 1),
        ("mfu", "share of the processor's peak", "%", 100),
        ("stall", "share of the time spent waiting for data", "%", 100),
    ):
        nested = any(isinstance(line.get(key), Mapping) for line in lines)
        names = sorted({name for line in lines for name in line.get(key, {})}) if nested else [""]
        for name in names:
            values = (
                [(line["step"], line.get(key, {}).get(name)) for line in lines]
                if nested
                else [(line["step"], line.get(key)) for line in lines]
            )
            points = [(float(step), value * factor) for step, value in values if value is not None]
            if points:
                curves.append((title.format(name.replace("_", " ")), unit, points))
    return curves


def _curve(title: str, points: Points, unit: str) -> dict[str, Any]:
    """Return the template values of one curve: its shape in pixels, and its numbers."""
    shown = _thinned(points, MOST_POINTS)
    low, high = _range([value for _, value in shown])
    first, last = shown[0][0], max(shown[-1][0], shown[0][0] + 1)

    def place(step: float, value: float) -> tuple[str, str]:
        x = LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        y = TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return f"{x:.1f}", f"{y:.1f}"

    def line(points: Points) -> str:
        return " ".join(",".join(place(*point)) for point in points)

    rough = len(shown) >= SMOOTH_FROM and not title.startswith("learning rate")
    smooth = _smoothed(shown) if rough else shown
    (start, begin), (stop, end) = points[0], points[-1]
    values = [value for _, value in points]
    return {
        "title": title,
        "ends": f"{_short(begin)} → {_short(end)} {unit}".strip(),
        "summary": (
            f"{title}: {_short(begin)} at step {start:.0f}, {_short(end)} at step {stop:.0f}; "
            f"between {_short(min(values))} and {_short(max(values))}."
        ),
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "y_ticks": [(place(first, tick)[1], _short(tick)) for tick in _ticks(low, high)],
        "x_ticks": [(place(tick, low)[0], _short(tick)) for tick in _ticks(first, last, True)],
        "raw": line(shown) if rough else "",
        "smooth": line(smooth),
        "end": place(*smooth[-1]),
        "rows": _thinned(points, TABLE_ROWS),
    }


def _thinned(points: Points, most: int) -> Points:
    """Return at most this many points, each the mean of its neighbours; the last one is kept."""
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / (most - 1))
    groups = [points[i : i + size] for i in range(0, len(points) - 1, size)]
    means = [(group[0][0], sum(value for _, value in group) / len(group)) for group in groups]
    return [*means, points[-1]]


def _smoothed(points: Points) -> Points:
    """Return means over a window around each point, narrower at both ends."""
    reach, values = max(2, len(points) // 24), [value for _, value in points]
    smooth = []
    for i, (step, _) in enumerate(points):
        half = min(reach, i, len(points) - 1 - i)
        own = values[i - half : i + half + 1]
        smooth.append((step, sum(own) / len(own)))
    return smooth


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (max(0.0, low - room) if low >= 0 else low - room), high + room


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Return about four round numbers within a range."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    if whole:
        step = max(1.0, round(step))
    first = math.ceil(low / step)
    return [(first + i) * step for i in range(int(high / step) - first + 1)]


def _short(value: float) -> str:
    """Return 12345678 as "12.3M", 0.00002 as "2e-05"."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (size if letter != 'k' else 1e3):.3g}{letter}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


# ---- predictions ---------------------------------------------------------------------------------

SHOWN = 6  # samples of each objective
CANDIDATES = 48  # targets that a query is looked up among
NEW_TOKENS = 64
THUMBNAIL = 168  # pixels, longer side
CHUNK_TOKENS = 2048

Row = dict[str, Any]


def predict(loaded: Checkpoint, task: Task) -> list[Row]:
    """Return rows of {kind, id, drawn, query, expected, found, right, …}; a sample that cannot be
    shown is a row with its problem."""
    rows: list[Row] = []
    for part in task.parts if isinstance(task, JointTask) else [task]:
        if isinstance(part, GenerativeTask):
            rows += _answers(loaded, part)
        elif isinstance(part, ContrastiveTask):
            rows += _matches(loaded, part)
    return rows


def _answers(loaded: Checkpoint, task: GenerativeTask) -> list[Row]:
    rows = []
    for drawn, sample in _candidates(task, SHOWN):
        row: Row = {"kind": "answer", "id": sample.id, "drawn": drawn}
        try:
            row |= _answer(loaded, task, sample.id, sample.prompt)
        except VisavisError as error:
            row["problem"] = str(error)
        rows.append(row)
    return rows


def _answer(loaded: Checkpoint, task: GenerativeTask, id: str, prompt: Prompt) -> Row:
    roles = [message.role for message in prompt.messages]
    first = roles.index("assistant")
    question = Prompt(prompt.messages[:first])
    encoder, vlm = task.loader.encoder, loaded.vlm
    encoded = encoder.chat(question)
    room = encoder.context_length - len(encoded.token_ids)
    ids = generate(
        vlm,
        task.loader.pack([question], [encoded], ids=[id]),
        Sampler(Sampling()),
        max_new_tokens=min(NEW_TOKENS, room),
        stop_ids=frozenset(loaded.specials.eot_ids),
    )
    text = loaded.tokenizer.decode(list(ids), skip_special_tokens=True)
    if encoder.stop:
        text = text.partition(encoder.stop)[0]
    expected = Prompt(prompt.messages[first : first + 1])
    return {
        "query": shown(question),
        "expected": shown(expected),
        "found": {"text": text.strip(), "pictures": []},
        "right": text.strip() == expected.text.strip(),
    }


def _matches(loaded: Checkpoint, task: ContrastiveTask) -> list[Row]:
    samples = _candidates(task, CANDIDATES)
    item = task.loader.item
    try:
        keys = [one.target.content_key(content_hash) for _, one in samples]
        distinct = dict(zip(keys, (one for _, one in samples), strict=True))
        queries = [
            (one.id, one.query, item(one.id, one.query, one.instruction)) for _, one in samples
        ]
        targets = [
            (one.id, one.target, item(one.id, one.target, one.target_instruction))
            for one in distinct.values()
        ]
        similarity = _vectors(loaded, task, queries) @ _vectors(loaded, task, targets).T
    except VisavisError as error:
        return [{"kind": "match", "id": "", "drawn": False, "problem": str(error)}]
    found = list(distinct)
    best = similarity.argmax(1).tolist()
    right = [found[place] == key for place, key in zip(best, keys, strict=True)]
    return [
        {
            "kind": "match",
            "id": one.id,
            "drawn": drawn,
            "query": shown(one.query),
            "expected": shown(one.target),
            "found": shown(targets[place][1]),
            "score": round(float(similarity[number, place]), 3),
            "right": right[number],
            "hits": sum(right),
            "of": len(samples),
            "among": len(targets),
        }
        for number, (place, (drawn, one)) in enumerate(
            islice(zip(best, samples, strict=True), SHOWN)
        )
    ]


@torch.inference_mode()
def _vectors(
    loaded: Checkpoint, task: ContrastiveTask, items: Sequence[tuple[str, Prompt, PreparedPrompt]]
) -> Tensor:
    found = []
    for chunk in token_chunks([len(one.token_ids) for _, _, one in items], CHUNK_TOKENS):
        own = [items[i] for i in chunk]
        batch = task.loader.pack(
            [prompt for _, prompt, _ in own],
            [encoded for _, _, encoded in own],
            ids=[id for id, _, _ in own],
        )
        found.append(pooled(loaded.vlm, batch, task.pooling).float().cpu())
    return torch.cat(found)


def _candidates(task: GenerativeTask | ContrastiveTask, limit: int) -> list[tuple[bool, Any]]:
    """Return samples, and whether a step has drawn them."""
    return [
        (drawn, task.sources[name][number])
        for drawn, (name, number) in islice(task.sampler.all_samples(), limit)
    ]


def shown(prompt: Prompt) -> dict[str, Any]:
    """Return a prompt as {text, images}, its first images as small data URIs."""
    pictures = [
        thumbnail(part) if isinstance(part, Image) else type(part).__name__.lower()
        for part in prompt.visuals[:2]
    ]
    return {"text": prompt.text, "pictures": pictures}


def thumbnail(image: Image) -> str:
    """Return a small image as a data URI."""
    encoded = jpeg_preview(decode_image(image), THUMBNAIL)
    return "data:image/jpeg;base64," + base64.b64encode(encoded).decode()
