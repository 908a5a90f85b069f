"""Every way to load a model, and every kind of thing to show it, from the command line.

What the commands print is what the library gives for the same model, settings and items.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

import visavis
from tests.checkpoints.llava_files import original_names, save_original, save_tower, tiny_peer
from tests.checkpoints.transformers_files import TEXT, fast_tokenizer
from tests.cli.conftest import Run
from tests.cli.test_bad_input import assert_one_line
from tests.fakes import write_pictures
from tests.processing.test_pdf import pdf_bytes
from tests.processing.test_video import encode
from visavis.cli import app
from visavis.inputs import Document, Image, Page, Video

pytest.importorskip("av")
pytest.importorskip("pypdfium2")

LOADING = ("chat", "embed", "demo", "index add", "index search", "index watch")
CONVERTING = ("base", "vision_tower", "chat_template")


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return encode(tmp_path / "clip.mp4", num=20)


@pytest.fixture
def paper(tmp_path: Path) -> Path:
    (tmp_path / "paper.pdf").write_bytes(pdf_bytes(3))
    return tmp_path / "paper.pdf"


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A first stage that lacks its language model, its vision tower and a chat format."""
    folder = tmp_path_factory.mktemp("stage")
    peer = tiny_peer(LlamaConfig(**TEXT))
    save_original(folder / "stage", peer, with_words=False)
    (folder / "stage" / "model.safetensors").unlink()
    tensors = original_names(peer)
    projector = {name: tensor for name, tensor in tensors.items() if "mm_projector" in name}
    torch.save(projector, folder / "stage" / "mm_projector.bin")
    save_tower(folder / "tower", peer)
    LlamaForCausalLM(LlamaConfig(**TEXT)).save_pretrained(folder / "base")
    fast_tokenizer().save_pretrained(folder / "base")
    return folder / "stage"


def test_commands_have_an_option_for_each_argument_of_load() -> None:
    group = typer.main.get_command(app)
    commands = dict(group.commands)  # type: ignore[attr-defined]
    commands |= {f"index {name}": c for name, c in commands.pop("index").commands.items()}
    wanted = [name for name in inspect.signature(visavis.load).parameters if name != "name_or_path"]
    assert len(wanted) == 7
    for command in LOADING:
        named = {one.name for one in commands[command].params}
        assert named >= {*wanted}, command
    assert {one.name for one in commands["convert"].params} >= {*CONVERTING}


def test_a_model_in_parts(run: Run, stage: Path, tmp_path: Path) -> None:
    (path,) = write_pictures(tmp_path, 1)
    below = {"base": stage.parent / "base", "vision_tower": stage.parent / "tower"}
    words = ["--base", below["base"], "--vision-tower", below["vision_tower"], "--precision", "f32"]
    model = visavis.load(stage, chat_template="vicuna_v1", precision="f32", **below)  # type: ignore[arg-type]
    settings = ("--max-new-tokens", 5, "--chat-template", "vicuna_v1")
    shown = run("chat", stage, "What is it?", "-i", path, *words, *settings)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout == model.chat("What is it?", [path], max_new_tokens=5).text + "\n"
    assert_one_line(run("chat", stage, "What is it?", *words), "chat_template=")
    assert_one_line(run("chat", stage, "What is it?"), "base=")

    profiled = visavis.load(stage, profile="llave", precision="f32", **below)  # type: ignore[arg-type]
    items = ("-i", path, "--instruction", "Find me:", "--dim", 8, "--profile", "llave", "--json")
    whole = json.loads(run("embed", stage, *items, *words).stdout)
    expected = profiled.embed([path], instruction="Find me:", dim=8)
    np.testing.assert_allclose(whole["vectors"], expected, atol=1e-6)
    added = run("index", "add", "p.idx", path, "-m", stage, "--profile", "llave", *words)
    assert added.exit_code == 0, added.output
    other = run("index", "search", "p.idx", "x", "-m", stage, *words)  # another way to embed
    assert_one_line(other, "cannot be compared")
    out = tmp_path / "whole"
    done = run("convert", stage, out, "--to", "llava", "--chat-template", "vicuna_v1", *words[:4])
    assert done.exit_code == 0, done.output
    assert run("chat", out, "What is it?", "-i", path, *settings).exit_code == 0


def test_chat_about_a_video_and_a_document(
    run: Run, tiny: str, clip: Path, paper: Path, tmp_path: Path
) -> None:
    (path,) = write_pictures(tmp_path, 1)
    words = ("--document", paper, "--video", clip, "-i", path, "--max-new-tokens", 4, "--json")
    whole = json.loads(run("chat", tiny, "What is it?", *words).stdout)
    model = visavis.load(tiny)
    visuals = [Image(path), Video(clip), Document(paper)]  # always in this order
    expected = model.chat("What is it?", visuals, max_new_tokens=4)
    assert whole["text"] == expected.text
    assert whole["usage"]["prompt_tokens"] == expected.usage.prompt_tokens > 24 * 4


def test_embed_pages_or_the_whole(run: Run, tiny: str, clip: Path, paper: Path) -> None:
    model = visavis.load(tiny)
    words = ("embed", tiny, "--document", paper, "--video", clip, "-t", "words")
    lines = [json.loads(line) for line in run(*words).stdout.splitlines()]
    pages = [Image(Page(paper, number)) for number in (1, 2, 3)]
    names = [f"{paper}#page={number}" for number in (1, 2, 3)]
    assert [line["item"] for line in lines] == ["words", str(clip), *names]
    vectors = np.array([line["vector"] for line in lines])
    np.testing.assert_allclose(vectors, model.embed(["words", Video(clip), *pages]), atol=1e-6)
    (line,) = run("embed", tiny, "--document", paper, "--whole").stdout.splitlines()
    np.testing.assert_allclose(
        json.loads(line)["vector"], model.embed([Document(paper)])[0], atol=1e-6
    )


def test_an_index_of_all_kinds(run: Run, tiny: str, clip: Path, paper: Path) -> None:
    (clip.parent / "notes.txt").write_text("words")
    added = run("index", "add", "p.idx", clip.parent, "-m", tiny)
    assert added.stdout == "4 added; p.idx holds 4 items\n"
    found = run("index", "search", "p.idx", "--video", clip, "-k", 1, "-m", tiny)
    assert found.stdout == f"1.000  {clip}\n"
    words = ("index", "search", "p.idx", "--filter", "*.pdf#page=*", "-m", tiny, "--json")
    hits = json.loads(run(*words, "x").stdout)
    assert sorted(hit["source"] for hit in hits) == [f"{paper}#page={n}" for n in (1, 2, 3)]
    assert len(json.loads(run(*words, "--document", paper).stdout)) == 3


def test_what_cannot_be_shown(run: Run, tiny: str, clip: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.pdf").write_bytes(pdf_bytes(2)[:200])
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:500])
    shown: dict[str, tuple[str, ...]] = {
        "--document cut.pdf": ("cut.pdf", "damaged"),
        "--document clip.mp4": ("clip.mp4", "not a PDF"),
        "--document gone.pdf": ("gone.pdf", "does not exist"),
        "--video cut.mp4": ("cut.mp4", "cannot be read as a video"),
        "--video gone.mp4": ("gone.mp4", "does not exist"),
        "--image clip.mp4": ("it is a video",),
        "--image cut.pdf": ("it is a PDF document",),
    }
    for words, expected in shown.items():
        option, name = words.split()
        for result in (
            run("chat", tiny, "What is it?", option, tmp_path / name),
            run("embed", tiny, option, tmp_path / name, "-o", "v.npy"),
        ):
            assert_one_line(result, *expected)
    assert not (tmp_path / "v.npy").exists()


def test_names_that_are_unknown(run: Run, tiny: str, tmp_path: Path) -> None:
    assert_one_line(
        run("chat", tiny, "hi", "--chat-template", "vicuna_v2"), "did you mean 'vicuna_v1'"
    )
    assert_one_line(run("embed", tiny, "-t", "hi", "--profile", "lave"), "did you mean 'llave'")
    assert_one_line(run("chat", tiny, "hi", "--base", tmp_path / "gone"), "gone")
    assert_one_line(run("chat", tiny, "hi", "--base", tiny), "has no use for it")
    (tmp_path / "none.jsonl").write_text("\n")
    assert_one_line(run("embed", tiny, "--items", "none.jsonl"), "holds no lines")


def test_beams_and_a_cache_of_pictures(run: Run, tiny: str, tmp_path: Path) -> None:
    (path,) = write_pictures(tmp_path, 1)
    model = visavis.load(tiny)
    expected = model.chat("What?", [path], max_new_tokens=6, beams=3, length_penalty=0.5).text
    words = ("-i", path, "--max-new-tokens", 6, "--image-cache", tmp_path / "seen")
    for _ in range(2):
        shown = run("chat", tiny, "What?", *words, "--beams", 3, "--length-penalty", 0.5)
        assert shown.exit_code == 0 and shown.stdout == expected + "\n"
        assert len(list((tmp_path / "seen").iterdir())) == 1
    assert_one_line(run("chat", tiny, "What?", "--beams", 3, "--temperature", 1), "beams is 3")
    assert_one_line(run("chat", tiny, "What?", "--image-cache", path), "name another folder")
