"""`report.html` of a run: curves, what was trained, what the model says. One file, no script.

Made from what the run left in its folder: recipe.json, log.jsonl, trained.json, samples.json. It
needs no network and runs under the strictest content policy, which it brings along. Knows files
and HTML; no model.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from visavis.train.metrics import read_log
from visavis.utils import write_atomically

WIDTH, HEIGHT = 520, 230  # of a curve's drawing
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 30  # of them, margins
MOST_POINTS = 500  # of a curve; more are averaged
SMOOTH_FROM = 24  # points from which a smoothed curve is drawn too
TABLE_ROWS = 24  # of a curve's numbers

Points = list[tuple[float, float]]


def write_report(out: Path) -> Path:
    """Write the report of the run in `out`; return its path."""
    recipe = json.loads((out / "recipe.json").read_text(encoding="utf-8"))
    log = read_log(out / "log.jsonl") if (out / "log.jsonl").is_file() else []
    trained = _read(out / "trained.json")
    samples = _read(out / "samples.json")
    body = [_head(recipe, log)]
    for stage in recipe["stages"]:
        name = stage["name"]
        lines = [line for line in log if line.get("stage") == name]
        body.append(_stage(stage, lines, trained.get(name, []), samples.get(name, [])))
    body.append(_settings(recipe))
    with write_atomically(out / "report.html") as temporary:
        temporary.write_text(_page(recipe["name"], body), encoding="utf-8")
    return out / "report.html"


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _page(name: str, body: Sequence[str]) -> str:
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)} · training report</title>\n<style>{style}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(body)}</main>\n</body>\n</html>\n"
    )


def _head(recipe: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> str:
    steps = {line["stage"]: line["step"] for line in log if "step" in line}
    model = recipe["model"]
    base = model["base"] or f"{model['language_model']} + {model['vision_tower']}"
    facts = {
        "model": base,
        "steps": f"{sum(steps.values()):,}",
        "tokens": _short(sum(line.get("tokens", 0) for line in log)),
        "time": _duration(sum(line.get("seconds", 0.0) for line in log)),
        "precision": recipe["precision"],
        "seed": recipe["seed"],
    }
    rows = "".join(
        f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items()
    )
    return f'<h1>{escape(recipe["name"])}</h1>\n<dl class="facts">{rows}</dl>\n'


def _stage(
    stage: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    trained: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]],
) -> str:
    parts = [f"<h2>Stage “{escape(stage['name'])}”</h2>\n"]
    problems = [text for line in lines for text in line.get("problems", [])]
    parts += [f'<p class="notice">{escape(text)}</p>\n' for text in dict.fromkeys(problems)]
    curves = _curves([line for line in lines if "step" in line])
    if curves:
        drawn = "".join(_figure(title, points, unit) for title, unit, points in curves)
        parts.append(f'<div class="curves">{drawn}</div>\n')
    elif stage["kind"] == "steps":
        parts.append("<p class='soft'>No step of it is in the log.</p>\n")
    else:
        parts.append("<p class='soft'>Fitted on frozen vectors; it takes no steps.</p>\n")
    if trained:
        parts.append(_table("What this stage trains", trained))
    if samples:
        parts.append(_samples(samples))
    return "".join(parts)


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


# ---- curves --------------------------------------------------------------------------------------


def _figure(title: str, points: Points, unit: str) -> str:
    """Return one curve with its numbers as a table."""
    shown = _thinned(points, MOST_POINTS)
    values = [value for _, value in shown]
    low, high = _range(values)
    first, last = shown[0][0], max(shown[-1][0], shown[0][0] + 1)

    def place(step: float, value: float) -> str:
        x = LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        y = TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return f"{x:.1f},{y:.1f}"

    drawn = []
    for tick in _ticks(low, high):
        y = place(first, tick).partition(",")[2]
        drawn.append(
            f'<line class="grid" x1="{LEFT}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}"/>'
            f'<text x="{LEFT - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{_short(tick)}</text>'
        )
    for tick in _ticks(first, last, whole=True):
        x = place(tick, low).partition(",")[0]
        drawn.append(f'<text x="{x}" y="{HEIGHT - 8}" text-anchor="middle">{_short(tick)}</text>')
    rough = len(shown) >= SMOOTH_FROM and not title.startswith("learning rate")
    smooth = _smoothed(shown) if rough else shown
    if rough:
        drawn.append(f'<polyline class="raw" points="{" ".join(place(*p) for p in shown)}"/>')
    drawn.append(f'<polyline class="smooth" points="{" ".join(place(*p) for p in smooth)}"/>')
    x, y = place(*smooth[-1]).split(",")
    drawn.append(f'<circle class="end" cx="{x}" cy="{y}" r="3.5"/>')
    summary = (
        f"{title}: {_short(points[0][1])} at step {points[0][0]:.0f}, {_short(points[-1][1])} at "
        f"step {points[-1][0]:.0f}; between {_short(min(v for _, v in points))} and "
        f"{_short(max(v for _, v in points))}."
    )
    ends = f"{_short(points[0][1])} → {_short(points[-1][1])} {unit}".strip()
    rows = _thinned(points, TABLE_ROWS)
    return (
        f"<figure><figcaption>{escape(title)} <span>{escape(ends)}</span></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(summary)}">'
        f"{''.join(drawn)}</svg>"
        f"<details><summary>Numbers</summary>{_numbers(title, rows)}</details></figure>\n"
    )


def _numbers(title: str, rows: Points) -> str:
    cells = "".join(
        f'<tr><td class="number">{step:.0f}</td><td class="number">{value:.6g}</td></tr>'
        for step, value in rows
    )
    return (
        f'<div class="wide"><table><caption>{escape(title)}</caption><thead><tr>'
        '<th scope="col" class="number">step</th><th scope="col" class="number">value</th>'
        f"</tr></thead><tbody>{cells}</tbody></table></div>"
    )


def _thinned(points: Points, most: int) -> Points:
    """Return at most so many points, each the mean of its neighbours; the last one is kept."""
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


# ---- tables and samples --------------------------------------------------------------------------


def _table(caption: str, rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(rows[0])
    numeric = {c for c in columns if all(isinstance(row[c], int | float) for row in rows)}

    def cells(tag: str, values: Iterable[tuple[str, str]]) -> str:
        mark = ' class="number"'
        return "".join(
            f"<{tag}{mark if column in numeric else ''}>{text}</{tag.split()[0]}>"
            for column, text in values
        )

    head = cells('th scope="col"', [(column, escape(column)) for column in columns])
    lines = []
    for row in rows:
        texts = [(c, f"{row[c]:,}" if c in numeric else escape(str(row[c]))) for c in columns]
        first, rest = cells('th scope="row"', texts[:1]), cells("td", texts[1:])
        lines.append(f"<tr>{first}{rest}</tr>")
    return (
        f'<h3>{escape(caption)}</h3>\n<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>\n"
    )


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    parts = []
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
        cards = "".join(_card(sample) for sample in own)
        parts.append(f'<h3>{title}</h3>\n<p class="soft">{seen}</p>\n')
        parts.append(f'<ul class="samples">{cards}</ul>\n')
    return "".join(parts)


def _card(sample: Mapping[str, Any]) -> str:
    title = f"<h4>{escape(sample['id'])}</h4>"
    if "problem" in sample:
        return f'<li>{title}<p class="wrong">{escape(sample["problem"])}</p></li>'
    right = sample["right"]
    verdict = "as expected" if right else "not what was expected"
    found = "says" if sample["kind"] == "answer" else f"finds ({sample['score']:.2f})"
    rows = [
        ("asked", sample["query"], ""),
        ("expected", sample["expected"], ""),
        (f"{found}, {verdict}", sample["found"], "right" if right else "wrong"),
    ]
    listed = "".join(
        f"<dt{f' class={mark!r}' if mark else ''}>{escape(name)}</dt><dd>{_shown(prompt)}</dd>"
        for name, prompt, mark in rows
    )
    return f"<li>{title}<dl>{listed}</dl></li>"


def _shown(prompt: Mapping[str, Any]) -> str:
    pictures = "".join(
        f'<img src="{escape(one)}" alt="picture of the sample">'
        if one.startswith("data:")
        else f"<em>[{escape(one)}]</em> "
        for one in prompt["pictures"]
    )
    return pictures + (f"<div>{escape(prompt['text'])}</div>" if prompt["text"] else "")


def _settings(recipe: Mapping[str, Any]) -> str:
    text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=96)
    return (
        "<h2>Settings</h2>\n<details><summary>The whole recipe</summary>"
        f'<pre tabindex="0">{escape(text)}</pre></details>\n'
    )
