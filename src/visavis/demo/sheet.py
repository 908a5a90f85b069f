"""Contact sheet: an image with one row per query, its hits and their scores.

    ┌ title ──────────────────────────────┐
    │ query     [hit] [hit] [hit] [hit]   │   a query is a text or an image
    │           name  score …             │
Only draws; searches are made by `run.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont, ImageOps

MARGIN, GAP = 48, 18
LABEL_WIDTH = 236
TILE = (208, 156)  # width, height
CAPTION_HEIGHT = 30
ROW_GAP = 24
HEADER_HEIGHT = 96
CORNER = 10
SMOOTH = 4  # corners are drawn this much larger and shrunk

PAPER, INK, SOFT, LINE, ACCENT = "#faf8f5", "#24211d", "#6a645b", "#e0dad0", "#0e6a66"


@dataclass(frozen=True)
class SheetRow:
    """A query, its image if it has one, and (name, score, image) of each hit."""

    label: str
    hits: Sequence[tuple[str, float, Image.Image]]
    query_picture: Image.Image | None = None


def draw_sheet(title: str, subtitle: str, rows: Sequence[SheetRow]) -> Image.Image:
    """Return the sheet, as wide as its longest row needs."""
    columns = max((len(row.hits) for row in rows), default=1)
    row_height = TILE[1] + CAPTION_HEIGHT + ROW_GAP
    width = 2 * MARGIN + LABEL_WIDTH + columns * (TILE[0] + GAP)
    height = MARGIN + HEADER_HEIGHT + len(rows) * row_height + MARGIN - ROW_GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    room = width - 2 * MARGIN
    draw.text((MARGIN, MARGIN - 10), fit(draw, title, _font(34), room), INK, _font(34))
    draw.text((MARGIN, MARGIN + 38), fit(draw, subtitle, _font(17), room), SOFT, _font(17))
    top = MARGIN + HEADER_HEIGHT
    for row in rows:
        draw.line([(MARGIN, top - ROW_GAP / 2), (width - MARGIN, top - ROW_GAP / 2)], LINE)
        _draw_query(sheet, draw, row, top)
        for column, hit in enumerate(row.hits):
            left = MARGIN + LABEL_WIDTH + GAP + column * (TILE[0] + GAP)
            _draw_hit(sheet, draw, hit, left, top, best=column == 0)
        top += row_height
    return sheet


def _draw_query(sheet: Image.Image, draw: ImageDraw.ImageDraw, row: SheetRow, top: int) -> None:
    font = _font(21)
    y = top + 4
    if row.query_picture is not None:
        size = (132, 99)
        _paste(sheet, row.query_picture, (MARGIN, top), size)
        y += size[1] + 8
    for line in wrap(draw, row.label, font, LABEL_WIDTH - 8, max_lines=2 if y > top + 4 else 5):
        draw.text((MARGIN, y), line, INK, font)
        y += 28


def _draw_hit(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    hit: tuple[str, float, Image.Image],
    left: int,
    top: int,
    *,
    best: bool,
) -> None:
    name, score, picture = hit
    _paste(sheet, picture, (left, top), TILE)
    font = _font(15)
    number = f"{score:z.2f}"
    number_width = draw.textlength(number, font)
    baseline = top + TILE[1] + 7
    color = ACCENT if best else SOFT
    draw.text((left + TILE[0] - number_width, baseline), number, color, font)
    draw.text((left, baseline), fit(draw, name, font, TILE[0] - number_width - 12), INK, font)


def _paste(
    sheet: Image.Image, picture: Image.Image, at: tuple[int, int], size: tuple[int, int]
) -> None:
    """Paste an image into the sheet, center-cropped to `size`, with round corners."""
    width, height = size
    large = Image.new("L", (width * SMOOTH, height * SMOOTH), 0)
    box = (0, 0, width * SMOOTH - 1, height * SMOOTH - 1)
    ImageDraw.Draw(large).rounded_rectangle(box, CORNER * SMOOTH, fill=255)
    mask = large.resize(size, Image.Resampling.LANCZOS)
    cut = ImageOps.fit(picture.convert("RGB"), size, Image.Resampling.LANCZOS)
    sheet.paste(cut, at, mask)


def wrap(
    draw: ImageDraw.ImageDraw,
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    width: float,
    max_lines: int,
) -> list[str]:
    """Break text into lines no wider than `width`; what does not fit ends in an ellipsis."""
    lines: list[str] = []
    words = text.split()
    while words and len(lines) < max_lines:
        taken = 1
        while taken < len(words) and draw.textlength(" ".join(words[: taken + 1]), font) <= width:
            taken += 1
        is_last = len(lines) == max_lines - 1
        line = " ".join(words if is_last else words[:taken])
        lines.append(fit(draw, line, font, width))
        words = [] if is_last else words[taken:]
    return lines


def fit(
    draw: ImageDraw.ImageDraw,
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    width: float,
) -> str:
    """Return the text, shortened with an ellipsis until it is no wider than `width`."""
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
