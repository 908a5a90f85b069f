"""Videos and pages of documents on the page: shown, searched for and asked about."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from tests.fakes import tiny_model
from tests.processing.test_pdf import RED, pdf_bytes
from tests.processing.test_video import encode
from visavis import Index
from visavis.serve.app import create_app
from visavis.serve.config import make_config

pytest.importorskip("av")
pytest.importorskip("pypdfium2")


def test_a_video_and_a_page(tmp_path: Path) -> None:
    clip = encode(tmp_path / "clip.mp4", num=40)
    (tmp_path / "paper.pdf").write_bytes(pdf_bytes(2))
    with Index(tmp_path / "test.idx", tiny_model()) as index:
        index.add([clip, tmp_path / "paper.pdf"])
        config = make_config({"models": {"tiny": "tiny"}, "indexes": {"default": index.path}})
        app = create_app(config, models={"tiny": tiny_model()})
        client = TestClient(app, base_url="http://127.0.0.1")
        items = client.get("/page/items").json()["items"]
        names = ["clip.mp4", "paper.pdf, page 1", "paper.pdf, page 2"]
        assert [item["name"] for item in items] == names
        for item, size in zip(items, ((64, 48), (80, 40), (80, 40)), strict=True):
            shown = picture_of(client, f"{item['image']}&size=80")
            assert shown.size == size
            hits = client.post("/page/search", data={"like": item["id"]}).json()["hits"]
            assert {hit["id"] for hit in hits} == {one["id"] for one in items} - {item["id"]}
        red = picture_of(client, f"{items[2]['image']}&size=80").getpixel((8, 20))
        assert isinstance(red, tuple) and max(abs(a - b) for a, b in zip(red, RED, strict=True)) < 9
        tokens = [asked_about(client, item["id"])["tokens"] for item in items]
        assert all(tokens)


def picture_of(client: TestClient, address: str) -> Image.Image:
    response = client.get(address)
    assert response.status_code == 200, response.text
    return Image.open(io.BytesIO(response.content))


def asked_about(client: TestClient, number: int) -> dict[str, Any]:
    turn = {"role": "user", "text": "What is it?", "images": [{"item": number}]}
    response = client.post("/page/chat", data={"messages": json.dumps([turn])})
    events = [event.removeprefix("data: ") for event in response.text.split("\n\n") if event]
    done: dict[str, Any] = json.loads(events[-1])
    return done
