"""Searching and managing indexes over the API, beside other requests to the same model."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.fakes import picture, tiny_model, write_pictures
from tests.serve.serving import client_of, data_uri, serving
from visavis import Index


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "images", 5)
    with Index(tmp_path / "photos.idx", tiny_model()) as index:
        index.add(tmp_path / "images")
    return tmp_path


@pytest.fixture
def client(folder: Path) -> Iterator[httpx.Client]:
    indexes = {"photos": folder / "photos.idx", "notes": folder / "notes.idx"}
    with serving({"indexes": indexes}) as (address, _), client_of(address) as client:
        yield client


def test_search_by_words_image_and_item(client: httpx.Client, folder: Path) -> None:
    with Index(folder / "photos.idx", tiny_model()) as index:
        expected = {
            "words": index.search("some words", k=3),
            "image": index.search(picture(2), k=3),
            "both": index.search({"image": picture(2), "text": "at night"}, k=3),
        }
    bodies = {
        "words": {"text": "some words"},
        "image": {"image": data_uri(picture(2))},
        "both": {"image": data_uri(picture(2)), "text": "at night"},
    }
    for kind, body in bodies.items():
        found = client.post("/v1/search", json={**body, "k": 3}).json()
        assert found["index"] == "photos"
        assert [hit["source"] for hit in found["hits"]] == [hit.source for hit in expected[kind]]
        scores = [hit["score"] for hit in found["hits"]]
        assert scores == pytest.approx([hit.score for hit in expected[kind]], abs=1e-5)
    best = client.post("/v1/search", json=bodies["image"]).json()["hits"][0]
    like = client.post("/v1/search", json={"like": best["id"], "index": "photos"}).json()["hits"]
    assert like[0]["id"] == best["id"]
    image = client.get(best["image"] + "&size=64")
    assert image.headers["content-type"] == "image/jpeg"
    assert max(Image.open(io.BytesIO(image.content)).size) <= 64
    some = client.post("/v1/search", json={"text": "x", "filter": "*-003.png"}).json()["hits"]
    assert [hit["name"] for hit in some] == ["picture-003.png"]


def test_words_filters_and_pages_of_hits(client: httpx.Client, folder: Path) -> None:
    items = [{"source": f"note {n}", "text": f"note {n} of the red car"} for n in range(3)]
    client.post("/v1/indexes/notes/items", json={"items": items})

    def hits(**body: Any) -> list[dict[str, Any]]:
        response = client.post("/v1/search", json={"index": "notes", **body})
        assert response.status_code == 200, response.text
        found: list[dict[str, Any]] = response.json()["hits"]
        return found

    best = hits(text="note 1")[0]
    assert (best["source"], best["words"], best["kind"]) == ("note 1", ["note", "1"], "text")
    assert best["why"].startswith("words: note, 1; similarity")
    assert [hit["vector_score"] for hit in hits(text="red", mode="text")] == [None] * 3
    whole = [hit["source"] for hit in hits(text="red car")]
    assert [hits(text="red car", k=1, offset=n)[0]["source"] for n in range(3)] == whole
    assert not any(hit["words"] for hit in hits(text="red", negative="car"))
    photos = {"index": "photos", "text": "picture"}
    inside = {"kinds": ["image"], "folder": str(folder / "images"), "after": "2020"}
    assert len(hits(**photos, filter=inside)) == 5
    for condition in ({"kinds": ["page"]}, {"before": "2020"}, {"glob": "*.gif"}, "kind:page",
                      {"metadata": {"tag": "x"}}, {"folder": "/elsewhere"}):  # fmt: skip
        assert hits(**photos, filter=condition) == []
    for body in (
        {"mode": "text"},
        {"text": "x", "filter": {"after": "soon"}},
        {"text": "x", "filter": "kinds:page"},
        {"text": "x", "offset": -1},
        {"text": "x", "mode": "fuzzy"},
    ):
        response = client.post("/v1/search", json={"index": "notes", **body})
        assert response.status_code == 400, body


def test_items_are_added_kept_and_found(client: httpx.Client) -> None:
    items = [
        {"source": "note 1", "text": "the first note"},
        {"source": "drawing", "image": data_uri(picture(9))},
        {"source": "broken", "image": "data:image/png;base64,AAAA"},
        {"source": "both", "image": data_uri(picture(8)), "text": "with words"},
    ]
    assert client.post("/v1/search", json={"text": "x", "index": "notes"}).json()["hits"] == []
    report = client.post("/v1/indexes/notes/items", json={"items": items}).json()
    assert (report["added"], len(report["failed"])) == (3, 1)
    assert report["failed"][0]["source"] == "broken"
    again = client.post("/v1/indexes/notes/items", json={"items": items[:2]}).json()
    assert (again["added"], again["unchanged"]) == (0, 2)
    cards = {one["name"]: one["items"] for one in client.get("/v1/indexes").json()["data"]}
    assert cards == {"photos": 5, "notes": 3}
    found = client.post("/v1/search", json={"image": data_uri(picture(9)), "index": "notes"})
    assert found.json()["hits"][0]["source"] == "drawing"
    listed = client.get("/v1/indexes/notes/items?limit=2").json()["data"]
    assert len(listed) == 2


def test_gone_files_are_pruned(client: httpx.Client, folder: Path) -> None:
    (folder / "images" / "picture-004.png").unlink()
    removed = client.post("/v1/indexes/photos/prune").json()["removed"]
    assert [Path(one).name for one in removed] == ["picture-004.png"]


def test_no_file_of_the_server_can_be_added(client: httpx.Client, folder: Path) -> None:
    path = str(folder / "images" / "picture-000.png")
    for item in ({"source": "x", "image": path}, {"source": path}):
        response = client.post("/v1/indexes/notes/items", json={"items": [item]})
        assert response.status_code == 400 or response.json()["failed"]
    report = client.post("/v1/indexes/notes/items", json={"items": [{"source": path, "text": "t"}]})
    assert report.json()["added"] == 1
    (item,) = client.get("/v1/indexes/notes/items").json()["data"]
    assert item["image"] is None  # a source that reads like a path is only a name


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/search", {}, 400),
        ("POST", "/v1/search", {"text": " "}, 400),
        ("POST", "/v1/search", {"like": -9999999999999999999999}, 400),
        ("POST", "/v1/search", {"like": -1}, 400),
        ("POST", "/v1/search", {"like": 9999}, 404),
        ("POST", "/v1/search", {"text": "x", "k": 0}, 400),
        ("POST", "/v1/search", {"text": "x", "index": "absent"}, 404),
        ("GET", "/v1/indexes/absent/items", None, 404),
        ("GET", "/v1/indexes/photos/items?limit=x", None, 400),
        ("GET", "/v1/indexes/photos/items/999/image", None, 404),
        ("GET", "/v1/indexes/photos/items/99999999999999999999/image", None, 404),
        ("GET", "/v1/indexes/photos/items/1/image?size=1", None, 400),
    ],
)
def test_what_cannot_be_found(
    client: httpx.Client, method: str, path: str, body: object, status: int
) -> None:
    response = client.request(method, path, json=body)
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"]


def test_searches_and_answers_at_once(client: httpx.Client) -> None:
    wrong: list[object] = []

    def search(seed: int) -> None:
        found = client.post("/v1/search", json={"image": data_uri(picture(seed))}).json()
        if found["hits"][0]["name"] != f"picture-{seed:03d}.png":
            wrong.append(found)

    def chat() -> None:
        body = {"messages": [{"role": "user", "content": "Go"}], "max_tokens": 24}
        answer = client.post("/v1/chat/completions", json=body).json()
        if answer["choices"][0]["message"]["content"] != expected:
            wrong.append(answer)

    expected = tiny_model().chat("Go", max_new_tokens=24).text
    threads = [threading.Thread(target=search, args=(seed,)) for seed in range(5)]
    threads += [threading.Thread(target=chat) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
