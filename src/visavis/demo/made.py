"""A document and a video that the demo makes of the sample images.

space-and-coffee.pdf    page 1 holds text, page 2 is a scan: an image of a page, without text
a-day-in-images.mp4     three scenes of four seconds: the camera moves over an image in each
"""

from __future__ import annotations

import io
import random
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from visavis.errors import InputError
from visavis.utils import write_atomically

DOCUMENT, VIDEO = "space-and-coffee.pdf", "a-day-in-images.mp4"
SCENES = ("rocket launch", "cat", "coffee")  # samples that the video shows
ON_SCAN = "coffee"
A4 = 595, 842  # points
SCAN = 992, 1403  # pixels: 120 to the inch
VIDEO_SIZE = 480, 360
FRAME_RATE, SCENE_SECONDS = 12, 4

TITLE = "Night launch: what the crew drank"
PARAGRAPHS = (
    "The countdown for the night launch began at ten in the evening. By midnight the crew of the "
    "control room had emptied four pots of coffee, and the kitchen sent up a fifth with a plate of "
    "ginger biscuits.",
    "Two minutes before ignition the wind over the pad dropped below five knots. The rocket rose "
    "on a column of orange light that was seen from three islands, and the telescope on the hill "
    "followed it until it passed behind the first stars.",
    "Invoice 4711 lists the evening: 42 espressos, 17 flat whites and one pot of peppermint tea "
    "for the flight director, paid in old coins from the collection box.",
)
DOCUMENT_QUERY = "invoice with peppermint tea"  # finds the page of text by its words
FLYER = ("THE PIKOLO BAR", "Espresso, flat white, filter", "Open all night during launches")


def make_media(folder: Path, images: Sequence[Path]) -> list[Path]:
    """Make the document and the video of some of the samples in a folder; keep those there.

    Raises:
        InputError: PyAV is not installed.
    """
    by_name = {path.stem.replace("-", " "): path for path in images}
    document, video = folder / DOCUMENT, folder / VIDEO
    if not {ON_SCAN, *SCENES} <= by_name.keys():
        return []
    if not document.is_file():
        make_document(document, by_name)
    if not video.is_file():
        make_video(video, by_name)
    return [document, video]


def make_document(path: Path, samples: Mapping[str, Path]) -> None:
    """Write the document, of the text above and a scan with one of the samples."""
    with write_atomically(path) as temporary:
        temporary.write_bytes(_pdf(_text_page(), _scan(samples[ON_SCAN])))


def make_video(path: Path, samples: Mapping[str, Path]) -> None:
    """Write the video (H.264).

    Raises:
        InputError: PyAV is not installed.
    """
    try:
        import av
    except ImportError:
        raise InputError(
            "the demo makes a video with PyAV, which is not installed; run "
            "`pip install 'visavis[demo]'`"
        ) from None
    with (
        write_atomically(path) as temporary,
        av.open(str(temporary), "w", format="mp4") as container,
    ):
        stream: Any = container.add_stream("libx264", rate=FRAME_RATE)
        stream.width, stream.height = VIDEO_SIZE
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "26", "preset": "fast", "threads": "1"}
        frame_of: Any = av.VideoFrame.from_image
        for frame in _frames([samples[name] for name in SCENES]):
            container.mux(stream.encode(frame_of(frame)))
        container.mux(stream.encode())


def _frames(images: Sequence[Path]) -> Iterator[Image.Image]:
    """Yield the frames: in each scene the camera moves closer to the middle of an image."""
    count = FRAME_RATE * SCENE_SECONDS
    for path in images:
        with Image.open(path) as opened:
            whole = ImageOps.fit(opened.convert("RGB"), (VIDEO_SIZE[0] * 2, VIDEO_SIZE[1] * 2))
        for number in range(count):
            margin = 0.15 * number / count
            wide, high = whole.size
            box = (wide * margin, high * margin, wide * (1 - margin), high * (1 - margin))
            yield whole.resize(VIDEO_SIZE, Image.Resampling.BILINEAR, box=box)


def _text_page() -> bytes:
    """Return the content stream of the page of text."""
    lines = [f"BT /F1 20 Tf 60 {A4[1] - 90} Td ({_escaped(TITLE)}) Tj /F1 12 Tf 0 -40 Td 17 TL"]
    for paragraph in PARAGRAPHS:
        lines += [f"({_escaped(line)}) Tj T*" for line in textwrap.wrap(paragraph, 78)]
        lines.append("T*")
    return "\n".join([*lines, "ET"]).encode("ascii")


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("(", "\\(").replace(")", "\\)")


def _scan(photo: Path) -> bytes:
    """Return a JPEG of a printed page as a scanner gives it: grey, tilted, with specks."""
    page = Image.new("L", SCAN, 250)
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(FLYER):
        font = ImageFont.load_default(64 if number == 0 else 40)
        draw.text((SCAN[0] / 2, 150 + 95 * number), line, 40, font, anchor="mm")
    with Image.open(photo) as opened:
        picture = ImageOps.fit(opened.convert("L"), (760, 620))
    page.paste(picture, ((SCAN[0] - 760) // 2, 470))
    specks = random.Random(1)
    for _ in range(600):
        page.putpixel((specks.randrange(SCAN[0]), specks.randrange(SCAN[1])), specks.randrange(160))
    page = page.rotate(0.8, Image.Resampling.BICUBIC, fillcolor=235)
    page = page.filter(ImageFilter.GaussianBlur(0.6))
    encoded = io.BytesIO()
    page.save(encoded, "JPEG", quality=80)
    return encoded.getvalue()


def _pdf(text: bytes, scan: bytes) -> bytes:
    """Return a PDF of a page of text and a page that is one image."""
    width, height = A4
    drawn = f"q {width} 0 0 {height} 0 0 cm /Scan Do Q".encode()
    box = f"/MediaBox [0 0 {width} {height}]"
    font = "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
    image = (
        f"/Type /XObject /Subtype /Image /Width {SCAN[0]} /Height {SCAN[1]} "
        "/ColorSpace /DeviceGray /BitsPerComponent 8 /Filter /DCTDecode"
    )

    def page(content: int, resources: str) -> bytes:
        contents = f"/Contents {content} 0 R /Resources << {resources} >>"
        return f"<< /Type /Page /Parent 2 0 R {box} {contents} >>".encode()

    def stream(data: bytes, entries: str = "") -> bytes:
        return f"<< {entries} /Length {len(data)} >>\nstream\n".encode() + data + b"\nendstream"

    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R 4 0 R] /Count 2 >>",
        page(5, f"/Font << /F1 {font} >>"),
        page(6, "/XObject << /Scan 7 0 R >>"),
        stream(text),
        stream(drawn),
        stream(scan, image),
    ]
    whole, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(whole))
        whole += f"{number} 0 obj\n".encode() + content + b"\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    count = len(objects) + 1
    return (
        whole
        + (
            f"xref\n0 {count}\n0000000000 65535 f \n{table}"
            f"trailer\n<< /Size {count} /Root 1 0 R >>\nstartxref\n{len(whole)}\n%%EOF\n"
        ).encode()
    )
