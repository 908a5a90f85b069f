"""The web page's requests to a real server on a loopback socket, with a real tiny model."""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.fakes import picture, tiny_model, write_pictures
from tests.serve.serving import data_uri, png, serving
from visavis import Index
from visavis.errors import InputError
from visavis.index.filters import Filter
from visavis.index.relevance import relevance
from visavis.serve import listen, require_web_packages
from visavis.serve.config import Limits
from visavis.serve.dialects.page import WEB_FOLDER


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def index(folder: Path) -> Iterator[Index]:
    write_pictures(folder / "pictures", 5)
    with Index(folder / "test.idx", tiny_model()) as opened:
        opened.add([folder / "pictures", {"text": "only words"}, picture(50)])
        yield opened


@pytest.fixture(scope="module")
def address(index: Index) -> Iterator[str]:
    settings = {"indexes": {"default": index.path}}
    with serving(settings, examples=["a cat"]) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=60, trust_env=False) as opened:
        yield opened


def upload(content: bytes, field: str = "image") -> dict[str, Any]:
    return {field: ("upload.png", content, "image/png")}


def shown(client: httpx.Client, **parameters: Any) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = client.get("/page/items", params=parameters).json()["items"]
    return items


def ask(client: httpx.Client, messages: Any, **fields: Any) -> list[dict[str, Any]]:
    data = {"messages": json.dumps(messages), **fields.pop("data", {})}
    with client.stream("POST", "/page/chat", data=data, **fields) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        text = "".join(response.iter_text())
    return [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n") if event]


def question(text: str = "What is it?", *images: dict[str, int]) -> list[dict[str, Any]]:
    return [{"role": "user", "text": text, "images": list(images)}]


def test_the_page_and_what_it_needs(client: httpx.Client) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert "unsafe" not in page.headers["content-security-policy"]
    for part in ("page.js", "page.css", "panel.css", "icon.svg"):
        assert f"/static/{part}" in page.text
        assert client.get(f"/static/{part}").status_code == 200
    assert "http" not in page.text.replace("http-equiv", ""), "the page needs nobody else"


def test_every_module_of_the_page_is_served(client: httpx.Client) -> None:
    waiting, seen = ["page.js"], set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        script = client.get(f"/static/{name}")
        assert script.headers["content-type"].startswith("text/javascript")
        waiting += set(re.findall(r'from "\./([\w.]+)"', script.text)) - seen - set(waiting)
    assert seen == {path.name for path in WEB_FOLDER.glob("*.js")}


def test_every_word_is_there_in_every_language() -> None:
    words = (WEB_FOLDER / "strings.js").read_text(encoding="utf-8")
    table = words[words.index("const WORDS") : words.index("export const LANGUAGES")]
    pairs = re.findall(r'^  (\w+): \[\s*"(.*?)",\s*"(.*?)",?\s*\]', table, re.MULTILINE)
    assert len(pairs) == len(re.findall(r"^  \w+: \[", table, re.MULTILINE)) > 80
    for key, english, german in pairs:
        assert (
            re.findall(r"{\w+}", english)
            and sorted(re.findall(r"{\w+}", english)) == sorted(re.findall(r"{\w+}", german))
        ) or "{" not in english + german, key
    known = {key for key, _, _ in pairs}
    html = (WEB_FOLDER / "index.html").read_text(encoding="utf-8")
    used = set(re.findall(r'data-t(?:-\w+)?="(\w+)"', html))
    for path in WEB_FOLDER.glob("*.js"):
        used |= set(re.findall(r'\b(?:t|count|nodes)\("(\w+)"', path.read_text(encoding="utf-8")))
    assert used <= known, used - known


def test_info_and_facets(client: httpx.Client, folder: Path) -> None:
    assert client.get("/page/info").json() == {
        "model": "tiny",
        "chat": True,
        "where": True,
        "examples": ["a cat"],
        "folders": [],
    }
    facets = client.get("/page/facets").json()
    assert facets["kinds"] == {"image": 6, "page": 0, "video": 0, "text": 1}
    assert facets["folders"] == [{"folder": str(folder / "pictures"), "count": 5}]


def test_items_in_blocks_and_with_filters(client: httpx.Client, folder: Path) -> None:
    whole = client.get("/page/items").json()
    assert whole["total"] == 7
    assert whole["items"][0]["name"] == "picture-000.png"
    assert next(item for item in whole["items"] if item["kind"] == "text")["image"] is None
    parts = [shown(client, offset=offset, limit=3) for offset in (0, 3, 6, 9)]
    assert [item for part in parts for item in part] == whole["items"]
    assert [item["kind"] for item in shown(client, kinds="text")] == ["text"]
    assert len(shown(client, kinds="image,text")) == 7
    assert len(shown(client, folder=folder / "pictures")) == 5
    assert not shown(client, folder=folder / "pict")
    today = date.today().isoformat()
    assert len(shown(client, after=today, before=today)) == 5
    assert not shown(client, before="2001-01-01")


def test_search_by_words(client: httpx.Client, index: Index) -> None:
    hits = client.post("/page/search", data={"text": "some words", "k": "3"}).json()["hits"]
    expected = index.search("some words", k=3)
    assert [hit["source"] for hit in hits] == [hit.source for hit in expected]
    assert [hit["score"] for hit in hits] == pytest.approx(
        [hit.vector_score for hit in expected], abs=1e-4
    )
    assert [tuple(hit["words"]) for hit in hits] == [hit.words for hit in expected]


def test_search_in_blocks_with_filters_and_negative_words(
    client: httpx.Client, index: Index
) -> None:
    fields = {"text": "some words", "kinds": "image", "negative": "night"}
    whole = client.post("/page/search", data=fields).json()
    expected = index.search("some words", 10, Filter(kinds=("image",)), negative="night")
    assert whole["total"] == len(expected) == 6
    assert [hit["source"] for hit in whole["hits"]] == [hit.source for hit in expected]
    parts = [
        client.post("/page/search", data={**fields, "k": "4", "offset": str(offset)}).json()["hits"]
        for offset in (0, 4)
    ]
    assert parts[0] + parts[1] == whole["hits"]


def test_search_by_an_uploaded_picture(client: httpx.Client) -> None:
    response = client.post("/page/search", files=upload(png(picture(3))))
    best = response.json()["hits"][0]
    assert best["name"] == "picture-003.png"
    assert best["score"] == pytest.approx(1, abs=1e-4)


def test_search_by_picture_and_words(client: httpx.Client, index: Index) -> None:
    response = client.post("/page/search", files=upload(png(picture(3))), data={"text": "at night"})
    expected = index.search({"image": picture(3), "text": "at night"})
    assert response.json()["hits"][0]["source"] == expected[0].source
    assert response.json()["hits"][0]["score"] == pytest.approx(expected[0].vector_score, abs=1e-4)


@pytest.mark.parametrize("name", ["picture-002.png", "item ", "only words"])
def test_search_like_an_item(client: httpx.Client, index: Index, name: str) -> None:
    item = next(item for item in shown(client) if item["name"].startswith(name))
    hits = client.post("/page/search", data={"like": str(item["id"])}).json()["hits"]
    assert [hit["id"] for hit in hits] == [hit.item.id for hit in index.similar(item["id"], 10)]
    assert item["id"] not in [hit["id"] for hit in hits]


def test_pictures_by_number(client: httpx.Client) -> None:
    items = shown(client)
    for item in items:
        if item["image"] is None:
            continue
        response = client.get(item["image"] + "&size=64")
        assert response.headers["content-type"] == "image/jpeg"
        assert max(Image.open(io.BytesIO(response.content)).size) <= 64
    words = next(item for item in items if item["image"] is None)
    assert client.get(f"/page/items/{words['id']}/image").status_code == 404
    assert client.get("/page/items/99999/image").status_code == 404
    assert client.get(f"/page/items/{2**70}/image").status_code == 404
    for size in ("0", "100000", "x"):
        assert client.get(f"/page/items/1/image?size={size}").status_code == 400


@pytest.mark.parametrize(
    "path",
    [
        "/page/items/..%2f..%2fetc%2fpasswd/image",
        "/static/..%2fapp.py",
        "/static/../app.py",
        "/static/%2e%2e/%2e%2e/api.py",
        "/test.idx",
    ],
)
def test_nothing_is_served_by_path(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code in (404, 405)


def test_the_file_of_an_item(client: httpx.Client, index: Index) -> None:
    items = shown(client)
    first = items[0]
    whole = client.get(first["file"])
    assert whole.content == Path(first["source"]).read_bytes()
    assert whole.headers["content-type"] == "image/png"
    part = client.get(first["file"], headers={"range": "bytes=2-5"})
    assert part.status_code == 206
    assert part.content == whole.content[2:6]
    for item in items[5:]:  # from memory
        assert item["file"] is None
        assert client.get(f"/page/items/{item['id']}/file").status_code == 404


def test_where_it_looked(client: httpx.Client) -> None:
    number = shown(client)[1]["id"]
    found = client.post("/page/where", data={"text": "a cat", "like": str(number)}).json()
    expected = relevance(tiny_model(), picture(1), "a cat")
    assert expected is not None
    assert (found["rows"], found["columns"]) == expected.cells.shape
    assert np.allclose(found["relevance"], expected.cells, atol=2e-4)
    files = {**upload(png(picture(1))), **upload(png(picture(2)), "query")}
    by_image = client.post("/page/where", files=files).json()
    expected = relevance(tiny_model(), picture(1), picture(2))
    assert expected is not None
    assert np.allclose(by_image["relevance"], expected.cells, atol=2e-4)


def test_chat_streams_pieces(client: httpx.Client) -> None:
    asked = question("What is it?", {"file": 0})
    *pieces, last = ask(client, asked, files=upload(png(picture(1)), "file"))
    text = "".join(event["piece"] for event in pieces)
    expected = tiny_model().chat("What is it?", [picture(1)])
    assert text == expected.text
    assert last["tokens"] == expected.usage.completion_tokens
    assert last["done"] == expected.finish_reason


def test_chat_about_items_and_files_in_several_turns(client: httpx.Client) -> None:
    number = shown(client)[2]["id"]
    turns = [
        *question("What?", {"item": number}),
        {"role": "assistant", "text": "A thing."},
        *question("And this one?", {"file": 1}, {"file": 0}),
    ]
    files = [("file", ("x.png", png(picture(seed)), "image/png")) for seed in (5, 6)]
    events = ask(client, turns, files=files)
    first = [{"type": "image_url", "image_url": {"url": data_uri(picture(2))}}]
    history = [
        {"role": "user", "content": [*first, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A thing."},
    ]
    expected = tiny_model().chat("And this one?", [picture(6), picture(5)], history=history)
    assert "".join(event.get("piece", "") for event in events) == expected.text


def test_chat_about_a_text(client: httpx.Client) -> None:
    item = next(item for item in shown(client) if item["kind"] == "text")
    events = ask(client, question("What is it?", {"item": item["id"]}))
    content = [{"type": "text", "text": "only words"}, {"type": "text", "text": "What is it?"}]
    expected = tiny_model().chat_many([[{"role": "user", "content": content}]])[0]
    assert "".join(event.get("piece", "") for event in events) == expected.text


def test_chat_without_a_picture(client: httpx.Client) -> None:
    events = ask(client, question("hello"))
    assert events[-1]["tokens"] > 0


def test_a_client_that_leaves_frees_the_model(client: httpx.Client) -> None:
    for _ in range(3):
        with client.stream("POST", "/page/chat", data={"messages": json.dumps(question())}) as r:
            next(r.iter_text())
    assert client.post("/page/search", data={"text": "x"}).status_code == 200


def test_requests_at_once_all_get_their_own_answer(address: str) -> None:
    found: dict[int, str] = {}

    def search(seed: int) -> None:
        response = httpx.post(
            f"{address}/page/search", files=upload(png(picture(seed))), timeout=60, trust_env=False
        )
        found[seed] = response.json()["hits"][0]["name"]

    threads = [threading.Thread(target=search, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {seed: f"picture-{seed:03d}.png" for seed in range(5)}


@pytest.mark.parametrize(
    ("path", "fields", "status"),
    [
        ("/page/search", {}, 400),
        ("/page/search", {"data": {"text": "  "}}, 400),
        ("/page/search", {"data": {"text": "x", "k": "many"}}, 400),
        ("/page/search", {"data": {"text": "x", "k": "0"}}, 400),
        ("/page/search", {"data": {"text": "x", "offset": "-1"}}, 400),
        ("/page/search", {"data": {"text": "x", "kinds": "song"}}, 400),
        ("/page/search", {"data": {"text": "x", "after": "yesterday"}}, 400),
        ("/page/search", {"data": {"text": "x", "image": "no file"}}, 400),
        ("/page/where", {"data": {"like": "1"}}, 400),
        ("/page/where", {"data": {"text": "x"}}, 400),
        ("/page/where", {"data": {"text": "x", "like": "12345"}}, 404),
        ("/page/where", {"data": {"text": "x"}, "files": upload(b"no picture")}, 415),
        ("/page/adding", {"data": {"folder": "0", "path": "/etc"}}, 403),
        ("/page/search", {"data": {"like": "12345"}}, 404),
        ("/page/search", {"files": {"text": ("t.png", b"x", "image/png")}}, 400),
        ("/page/chat", {"data": {"messages": json.dumps(question("x", {"file": 0}))}}, 400),
        ("/page/chat", {"data": {"messages": json.dumps(question("x", {}))}}, 400),
        ("/page/chat", {"data": {"messages": json.dumps(question("x", {"item": 12345}))}}, 404),
        ("/page/search", {"files": upload(b"no picture")}, 415),
        ("/page/search", {"files": upload(b"")}, 415),
        ("/page/chat", {"data": {"messages": "no json"}}, 400),
        ("/page/chat", {"data": {"messages": "[]"}}, 400),
        ("/page/chat", {"data": {"messages": '{"role": "user"}'}}, 400),
        ("/page/chat", {"data": {"messages": '[{"role": "robot", "text": "x"}]'}}, 400),
        ("/page/chat", {"data": {"messages": '[{"role": "assistant", "text": "x"}]'}}, 400),
    ],
)
def test_bad_requests(client: httpx.Client, path: str, fields: dict[str, Any], status: int) -> None:
    response = client.post(path, **fields)
    assert response.status_code == status, response.text
    assert response.json()["error"]


def test_a_question_that_cannot_be_answered_has_a_status(client: httpx.Client) -> None:
    data = {"messages": json.dumps(question("What?", {"file": 0}))}
    unreadable = client.post("/page/chat", data=data, files=upload(b"no picture", "file"))
    assert unreadable.status_code == 415
    assert "not a picture" in unreadable.json()["error"]
    long = client.post("/page/chat", data={"messages": json.dumps(question("long " * 300))})
    assert long.status_code == 400
    assert "tokens" in long.json()["error"]


def test_a_damaged_picture_in_a_chat_is_an_event(client: httpx.Client) -> None:
    asked = question("What?", {"file": 0})
    (event,) = ask(client, asked, files=upload(png(picture(1))[:-40], "file"))
    assert "image" in event["error"] or "picture" in event["error"]


def test_too_large_an_upload(client: httpx.Client) -> None:
    assert (
        client.post("/page/search", files=upload(bytes(Limits().body_bytes + 1))).status_code == 413
    )


def test_too_large_an_upload_that_does_not_say_so(client: httpx.Client) -> None:
    boundary = "b"
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="x.png"\r\n\r\n'
    ).encode()

    def body() -> Iterator[bytes]:
        yield head
        for _ in range(Limits().body_bytes // 2**20 + 1):
            yield bytes(2**20)

    headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
    response = client.post("/page/search", content=body(), headers=headers)
    assert response.status_code == 413


def test_a_picture_with_too_many_pixels(client: httpx.Client) -> None:
    huge = png(Image.new("1", (12_000, 9_000)))
    assert len(huge) < 100_000
    response = client.post("/page/search", files=upload(huge))
    assert response.status_code == 415
    assert "megapixels" in response.json()["error"]


def test_other_sites_are_refused(client: httpx.Client) -> None:
    fields = {"data": {"text": "x"}}
    evil = client.post("/page/search", headers={"origin": "https://evil.example"}, **fields)
    assert evil.status_code == 403
    assert client.get("/page/info", headers={"host": "evil.example"}).status_code == 400
    own = client.post("/page/search", headers={"origin": str(client.base_url)}, **fields)
    assert own.status_code == 200


def test_a_taken_port_gives_a_free_one() -> None:
    first = listen(0)
    port = first.getsockname()[1]
    second = listen(port)
    assert second.getsockname()[1] != port
    assert second.getsockname()[0] == "127.0.0.1"
    first.close()
    second.close()


def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"visavis\[serve\]"):
        require_web_packages()
