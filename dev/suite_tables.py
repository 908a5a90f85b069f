"""Write the tables of `docs/evaluation.md` from the registry of suites.

python dev/suite_tables.py
"""

from __future__ import annotations

from pathlib import Path

from visavis.evaluate.suite import Suite, Task, load_suite

PAGE = Path(__file__).parents[1] / "docs" / "evaluation.md"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
SUITES = ("mmeb-v1", "mmeb-v2", "mmeb-v3", "vqa", "video-retrieval", "llave-demo", "nano")
MINIATURE = "miniature files"
REAL = "real files"


def tables() -> str:
    """Return one table a suite; a suite that includes another one lists only its own tasks."""
    parts = []
    for name in SUITES:
        suite = load_suite(name)
        rows = [_row(suite, task) for task in suite.tasks.values() if not _inherited(suite, task)]
        head = "| task | source | metric | published | run on |\n|---|---|---|---|---|"
        parts.append("\n".join([f"### {name}: {suite.title}", "", head, *rows]))
    return "\n\n".join(parts)


def _inherited(suite: Suite, task: Task) -> bool:
    order = {"mmeb-v2": "mmeb-v1", "mmeb-v3": "mmeb-v2"}
    return suite.name in order and task.name in load_suite(order[suite.name]).tasks


def _row(suite: Suite, task: Task) -> str:
    if task.status:
        return f"| {task.name} |  |  |  | not run: {task.status} |"
    published = ", ".join(f"{_number(value)} {model}" for model, value in task.anchors.items())
    if task.get("published"):
        published = " / ".join(f"{value}" for value in task.get("published").values())
    status = REAL if suite.name == "nano" else MINIATURE
    source = task.source or "–"
    return f"| {task.name} | {source} | {task.metric} | {published or '–'} | {status} |"


def _number(value: float) -> str:
    return f"{100 * value:.1f}" if value <= 1 else f"{value:.1f}"


def page(text: str) -> str:
    """Return the page's text with the tables of today's registry."""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
