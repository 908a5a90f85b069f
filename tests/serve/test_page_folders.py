"""Adding folders from the web page: only allowed ones, with their progress."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fakes import write_pictures
from tests.serve.serving import client_of, serving
from visavis.serve.adding import CHUNK


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    write_pictures(folder / "allowed" / "few", 3)
    (folder / "allowed" / "few" / "broken.png").write_bytes(b"no image")
    (folder / "allowed" / "few" / "notes.txt").write_text("not read")
    (folder / "allowed" / ".hidden").mkdir()
    write_pictures(folder / "allowed" / "many", 6 * CHUNK, first_seed=100)
    (secret,) = write_pictures(folder / "private", 1, first_seed=50)
    (folder / "allowed" / "few" / "link.png").symlink_to(secret)
    (folder / "allowed" / "out").symlink_to(folder / "private")
    return folder


@pytest.fixture
def client(folder: Path, tmp_path: Path) -> Iterator[httpx.Client]:
    settings = {
        "indexes": {"default": tmp_path / "new.idx"},
        "allow_folders": [folder / "allowed"],
    }
    with serving(settings) as (address, _), client_of(address) as client:
        yield client


def begin(client: httpx.Client, path: str, folder: str = "0") -> httpx.Response:
    return client.post("/page/adding", data={"folder": folder, "path": path})


def ended(client: httpx.Client) -> dict[str, Any]:
    while True:
        progress: dict[str, Any] = client.get("/page/adding").json()
        if not progress["running"]:
            return progress
        time.sleep(0.05)


def test_a_folder_is_added(client: httpx.Client) -> None:
    assert client.get("/page/info").json()["folders"] == ["allowed"]
    assert client.get("/page/items").json() == {"total": 0, "items": []}
    assert client.get("/page/adding").json()["folder"] == ""
    assert begin(client, "few").json()["running"]
    progress = ended(client)
    assert progress["folder"] == os.path.join("allowed", "few")
    assert (progress["done"], progress["total"]) == (4, 4)
    assert (progress["added"], progress["num_failed"]) == (3, 1)
    assert progress["failed"][0][0] == os.path.join("few", "broken.png")
    left_out = {(suffix, number) for suffix, _, number in progress["left_out"]}
    assert left_out == {(".png", 1), (".txt", 1)}
    items = client.get("/page/items").json()["items"]
    assert [item["name"] for item in items] == [f"picture-{i:03d}.png" for i in range(3)]
    begin(client, "few")
    assert ended(client)["unchanged"] == 3


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("..", 403),
        ("../private", 403),
        ("out", 403),
        ("/etc", 403),
        ("few/../../private", 403),
        ("absent", 400),
        ("few/broken.png", 400),
        ("x" * 5000, 400),
        ("a\0b", 400),
    ],
)
def test_nothing_outside_is_added(client: httpx.Client, path: str, status: int) -> None:
    response = begin(client, path)
    assert response.status_code == status, response.text
    assert "private" not in response.json()["error"] or "private" in path
    assert client.get("/page/folders", params={"path": path}).status_code == status
    assert not client.get("/page/adding").json()["running"]


def test_numbers_that_are_no_folder(client: httpx.Client) -> None:
    assert begin(client, "", "1").status_code == 403
    assert begin(client, "", "-1").status_code == 400
    assert begin(client, "", "x").status_code == 400


def test_folders_in_an_allowed_one(client: httpx.Client) -> None:
    assert client.get("/page/folders").json() == {"folders": ["few", "many"]}
    assert client.get("/page/folders", params={"path": "few"}).json() == {"folders": []}


def test_one_at_a_time_and_it_can_be_stopped(client: httpx.Client) -> None:
    assert begin(client, "many").status_code == 200
    assert begin(client, "few").status_code == 409
    client.post("/page/adding/stop")
    progress = ended(client)
    assert progress["stopped"]
    assert progress["done"] < progress["total"] or not progress["total"]
    assert client.get("/page/items").json()["total"] == progress["added"]
    begin(client, "many")  # what is missing
    assert ended(client)["added"] == 6 * CHUNK - progress["added"]


def test_by_default_no_folder_is_added(tmp_path: Path, folder: Path) -> None:
    settings = {"indexes": {"default": tmp_path / "new.idx"}}
    with serving(settings) as (address, _), client_of(address) as client:
        assert client.get("/page/info").json()["folders"] == []
        assert begin(client, str(folder)).status_code == 403
        assert client.get("/page/folders").status_code == 403
