"""The MCP SDK's client against `visavis mcp` as a process, by both revisions of the protocol."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.fakes import picture, tiny_model, write_pictures, write_tiny_checkpoint
from tests.serve.serving import data_uri
from visavis import Index

pytest.importorskip("mcp")
from mcp import Client
from mcp.client.stdio import StdioServerParameters


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mcp")
    write_tiny_checkpoint(folder / "model")
    write_pictures(folder / "images", 4)
    write_pictures(folder / "private", 1, first_seed=50)
    with Index(folder / "test.idx", tiny_model()) as index:
        index.add([folder / "images", {"text": "only words"}])
    return folder


def command(folder: Path) -> StdioServerParameters:
    arguments = ["mcp", str(folder / "test.idx"), "--folder", str(folder / "images")]
    more = ["--model", str(folder / "model"), "--precision", "f32"]
    return StdioServerParameters(
        command=sys.executable, args=["-m", "visavis", *arguments, *more], env=dict(os.environ)
    )


def talk(folder: Path, mode: str, say: Callable[[Any], Awaitable[None]]) -> None:
    async def run() -> None:
        async with Client(command(folder), mode=mode, read_timeout_seconds=120) as client:
            await say(client)

    asyncio.run(run())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["2026-07-28", "auto", "legacy"])
def test_an_assistant_uses_every_tool(folder: Path, mode: str) -> None:
    async def say(client: Any) -> None:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == {"search", "similar", "describe_image", "add_folder"}
        assert "query" in tools["search"].input_schema["required"]
        assert tools["search"].annotations.read_only_hint

        found = await client.call_tool("search", {"query": "some words", "limit": 3})
        with Index(folder / "test.idx", tiny_model()) as index:
            expected = index.search("some words", k=3)
        hits = found.structured_content["hits"]
        assert [hit["item"] for hit in hits] == [hit.item.id for hit in expected]
        kinds = [block.type for block in found.content]
        assert kinds[0] == "text" and kinds.count("resource_link") == 3
        images = [block for block in found.content if block.type == "image"]
        assert images and max(size_of(images[0].data)) <= 256

        like = await client.call_tool("similar", {"image": data_uri(picture(2)), "limit": 1})
        (hit,) = like.structured_content["hits"]
        assert hit["source"].endswith("picture-002.png")
        resource = await client.read_resource(hit["uri"])
        assert size_of(resource.contents[0].blob) == (48, 36)

        told = await client.call_tool(
            "describe_image", {"item": hit["item"], "question": "What?", "max_new_tokens": 12}
        )
        answer = tiny_model().chat("What?", [folder / "images/picture-002.png"], max_new_tokens=12)
        assert told.structured_content["answer"] == answer.text.strip()

        added = await client.call_tool("add_folder", {"path": str(folder / "images")})
        assert added.structured_content["unchanged"] == 4

        for name, arguments, reason in (
            ("add_folder", {"path": str(folder / "private")}, "outside of the folders"),
            ("add_folder", {"path": str(folder / "images/../private")}, "outside of the folders"),
            ("describe_image", {"path": "/etc/passwd"}, "outside of the folders"),
            ("describe_image", {}, "exactly one"),
            ("similar", {"item": 999}, "no item 999"),
            ("search", {"query": " "}, "empty text"),
            ("search", {"query": "x", "limit": 0}, "limit is 0"),
        ):
            failed = await client.call_tool(name, arguments)
            assert failed.is_error, (name, arguments)
            assert reason in failed.content[0].text

    talk(folder, mode, say)


def size_of(data: str) -> tuple[int, int]:
    return Image.open(io.BytesIO(base64.b64decode(data))).size


def test_tools_in_one_process(folder: Path) -> None:
    from visavis.serve.mcp import Library, make_server

    async def run() -> None:
        library = Library(tiny_model, folder / "test.idx", [folder / "images"])
        async with Client(make_server(library)) as client:
            found = await client.call_tool("search", {"query": "words", "limit": 2})
            assert len(found.structured_content["hits"]) == 2
            text = await client.call_tool("similar", {"item": 5})
            assert text.is_error and "has no image" in text.content[0].text
            link = os.path.join(folder, "images", "link")
            os.symlink(folder / "private", link)
            outside = await client.call_tool("add_folder", {"path": link})
            os.unlink(link)
            assert outside.is_error and "outside" in outside.content[0].text

    asyncio.run(run())
