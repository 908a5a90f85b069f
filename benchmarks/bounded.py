"""What the child process of `processing/bounded.py` costs honest files.

    python benchmarks/bounded.py PDF TOKENIZER_JSON

Pages a second, time of a rendered chat template and time of a loaded tokenizer, in this process and
in the child, interleaved in one run; medians of the rounds and of their ratios.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pypdfium2
from tokenizers import Tokenizer

from visavis.inputs import Document, Page
from visavis.processing import bounded, jinja_sandbox, tokenizer_check
from visavis.processing.pdf import pages, render

ROUNDS, PAGES, RENDERINGS = 5, 8, 200
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURN = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "A cat. " * 20},
]
VALUES = {"messages": TURN * 3, "add_generation_prompt": True}


def render_here(path: Path, number: int) -> None:
    """Render a page in this process, as before there was a child."""
    with path.open("rb") as data:
        document = pypdfium2.PdfDocument(data)
        document.init_forms()
        page = document[number - 1]
        page.render(scale=1600 / max(page.get_size()), rev_byteorder=True).to_pil().convert("RGB")
        document.close()


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compare(name: str, here: Callable[[], object], child: Callable[[], object]) -> None:
    rounds = [(seconds(here), seconds(child)) for _ in range(ROUNDS)]
    first, second = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(b / a for a, b in rounds)
    print(f"{name}: {first * 1e3:.3g} ms here, {second * 1e3:.3g} ms in the child, {ratio:.2f}×")


def load_first(path: Path) -> None:
    tokenizer_check._passed.clear()
    tokenizer_check.read_tokenizer(path)


def main() -> None:
    pdf, tokenizer = Path(sys.argv[1]), Path(sys.argv[2])
    numbers = range(1, min(PAGES, len(pages(Document(pdf)))) + 1)
    jinja_sandbox.render_bounded(TEMPLATE, VALUES)
    template = jinja_sandbox._compiled(TEMPLATE)
    compare(
        f"{len(numbers)} pages of {pdf.name}",
        lambda: [render_here(pdf, number) for number in numbers],
        lambda: [render(Page(pdf, number)) for number in numbers],
    )
    compare(
        f"{RENDERINGS} rendered chat templates",
        lambda: [template.render(VALUES) for _ in range(RENDERINGS)],
        lambda: [jinja_sandbox.render_bounded(TEMPLATE, VALUES) for _ in range(RENDERINGS)],
    )
    size = tokenizer.stat().st_size / 1e6
    compare(
        f"a tokenizer.json of {size:.1f} MB, its first time in a process",
        lambda: Tokenizer.from_buffer(tokenizer.read_bytes()),
        lambda: load_first(tokenizer),
    )
    bounded._close_all()
    cold = seconds(lambda: jinja_sandbox.render_bounded(TEMPLATE, VALUES))
    print(f"the first call, with the start of the child: {cold * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
