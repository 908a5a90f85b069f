"""A run's report: one valid page that runs nothing and asks nobody, whatever the data says."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fakes import picture, write_pictures, write_tiny_checkpoint
from tests.train.training import TinyRun, chats, matches
from visavis.checkpoints.checkpoint import Checkpoint
from visavis.data.examples import Conversation
from visavis.errors import TrainError
from visavis.inputs import Image, Message, Prompt, Text
from visavis.train import metrics
from visavis.train.lora import LoRALinear, add_lora
from visavis.train.metrics import choose_trackers
from visavis.train.objectives.contrastive import JointTask
from visavis.train.recipe import LoraRecipe, Recipe
from visavis.train.report import predict, thumbnail, write_report
from visavis.train.runner import run_recipe

VOID = {"meta", "img", "br", "line", "polyline", "circle"}
HOSTILE = '<script>alert(1)</script>" onload="x'


class Page(HTMLParser):
    """Checks that every element is closed; keeps texts and attributes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.source[-200:]

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def write_run(folder: Path, lines: list[dict[str, Any]], samples: list[dict[str, Any]]) -> Path:
    recipe = {
        "name": HOSTILE,
        "model": {"base": "some/base"},
        "stages": [{"kind": "steps", "name": "chat"}, {"kind": "head", "name": "fit"}],
        "precision": "bf16",
        "seed": 3,
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "samples.json").write_text(json.dumps({"chat": samples}))
    rows = [{"part": "decoder", "parameters": 1234567, "trained": 0, "as": "", "learning rate": ""}]
    (folder / "trained.json").write_text(json.dumps({"chat": rows}))
    return write_report(folder)


def some_lines(num: int) -> list[dict[str, Any]]:
    return [
        {
            "stage": "chat",
            "step": 10 * (i + 1),
            "loss": {"generative": 3.0 - i / num},
            "rate": {"lora": 1e-4},
            "norm": {"lora": None if i == 1 else 0.5},
            "tokens": 1000,
            "seconds": 2.0,
            "stall": 0.02,
            "tokens_per_second": 500 + i,
        }
        for i in range(num)
    ]


def test_the_page_is_closed_to_everything_outside(tmp_path: Path) -> None:
    said = {"text": HOSTILE, "pictures": [thumbnail(Image(picture(1))), "video"]}
    row = {"kind": "answer", "id": HOSTILE, "drawn": False, "right": False}
    samples = [
        {**row, "query": said, "expected": said, "found": said},
        {"kind": "answer", "id": "b", "drawn": False, "problem": HOSTILE},
    ]
    lines = [*some_lines(40), {"stage": "chat", "saved": "model", "problems": [HOSTILE]}]
    page = Page(write_run(tmp_path, lines, samples))
    assert page.count("script") == page.count("link") == 0
    assert not any(name.startswith("on") for _, own in page.elements for name in own)
    assert not any("style" in own for _, own in page.elements)
    assert "http:" not in page.source and "https:" not in page.source
    sources = [own["src"] for tag, own in page.elements if tag == "img"]
    assert sources and all(str(source).startswith("data:image/jpeg;base64,") for source in sources)
    assert page.text.count(HOSTILE) == 9  # as text, wherever it came from
    policies = [own["content"] for _, own in page.elements if "http-equiv" in own]
    (style,) = re.findall("<style>(.*)</style>", page.source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policies == [f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'"]


def test_the_page_says_what_was_run(tmp_path: Path) -> None:
    page = Page(write_run(tmp_path, some_lines(40), []))
    labels = [own["aria-label"] for tag, own in page.elements if tag == "svg"]
    assert [str(label).partition(":")[0] for label in labels] == [
        "generative loss",
        "learning rate of lora",
        "gradient norm of lora",
        "speed",
        "share of the time spent waiting for data",
    ]
    assert str(labels[0]).startswith("generative loss: 3 at step 10, 2.02 at step 400; between")
    assert all(own.get("role") == "img" for tag, own in page.elements if tag == "svg")
    for fact in ("some/base", "400", "40k", "1 min 20 s", "bf16", "1,234,567", "takes no steps"):
        assert fact in page.text, fact


@pytest.mark.parametrize("num", [0, 1, 2, 700])
def test_runs_of_any_length_are_drawn(num: int, tmp_path: Path) -> None:
    page = Page(write_run(tmp_path, some_lines(num), []))
    assert page.count("svg") == 5 * min(1, num)
    assert len(page.source) < 200_000


def loaded(run: TinyRun) -> Checkpoint:
    model = run.model
    parts = (model.tokenizer, model.specials, model.profile, model.processor, model.fingerprint)
    return Checkpoint(model.name, run.vlm, *parts)


def test_predictions_are_the_models_own(tmp_path: Path) -> None:
    run = TinyRun()
    answer = Message("assistant", (Text("red"),))
    broken = Prompt((Message("user", (Image(b"none"), Text("what?"))), answer))
    task = JointTask(
        [run.generative(samples=[*chats(4), Conversation("broken", broken)]), run.contrastive()]
    )
    rows = predict(loaded(run), task)
    assert [row["kind"] for row in rows] == ["answer"] * 5 + ["match"] * 6
    assert not any(row["drawn"] for row in rows)
    bad = [row for row in rows if "problem" in row]
    assert [row["id"] for row in bad] == ["broken"] and "cannot be read" in bad[0]["problem"]
    samples = {sample.id: sample for sample in chats(4)}
    for row in rows[:5]:
        if row["id"] in samples:
            prompt = samples[row["id"]].prompt
            question = prompt.messages[0].parts
            shown = [part.source for part in question if isinstance(part, Image)]
            text = str(question[-1].text)  # type: ignore[union-attr]
            reply = run.model.chat(text, shown, max_new_tokens=64).text
            assert row["found"]["text"] == reply.strip()
            assert row["expected"]["text"] == prompt.messages[1].parts[0].text  # type: ignore[union-attr]
    assert {row["of"] for row in rows[5:]} == {9} and all(0 <= row["hits"] <= 9 for row in rows[5:])
    run.train(task.parts[1], tmp_path, steps=1)
    drawn = [row["drawn"] for row in predict(loaded(run), task)[5:]]
    assert drawn == [False] * 3 + [True] * 3


def test_predictions_speak_through_adapters() -> None:
    run = TinyRun()
    before = predict(loaded(run), run.generative())
    add_lora(run.vlm.decoder, LoraRecipe(rank=4))
    task = run.generative()
    assert [row["found"] for row in predict(loaded(run), task)] == [r["found"] for r in before]
    for module in run.vlm.decoder.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.lora_b)
    assert [row["found"] for row in predict(loaded(run), task)] != [r["found"] for r in before]


# ---- a whole run ---------------------------------------------------------------------------------


def tiny_recipe(folder: Path, **settings: Any) -> Recipe:
    """A recipe on a tiny base and eight conversations, whose files are written too."""
    write_tiny_checkpoint(folder / "base")
    paths = write_pictures(folder / "data" / "images", 8)
    records = [
        {
            "id": f"record-{number}",
            "image": path.name,
            "conversations": [
                {"from": "human", "value": "<image>\nwhat is it?"},
                {"from": "gpt", "value": f"picture {number}"},
            ],
        }
        for number, path in enumerate(paths)
    ]
    (folder / "data" / "chats.json").write_text(json.dumps(records))
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": {"base": str(folder / "base")},
            "data": {"chats": {"format": "llava", "path": "chats.json", "images": "images"}},
            "precision": "f32",
            "stages": [
                {
                    "kind": "steps",
                    "name": "chat",
                    "steps": 3,
                    "generative": {"sources": {"chats": {}}, "batch": 2},
                    "train": {"connector": 1e-3, "language_model": 1e-3},
                    "log_every": 1,
                }
            ],
            **settings,
        }
    )


def test_a_run_ends_with_a_report_and_curves(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    run_recipe(tiny_recipe(tmp_path), tmp_path / "data", out)
    page = Page(out / "report.html")
    assert page.count("svg") >= 6 and "No step has drawn them" not in page.text
    assert "Steps have drawn 4 of these 6" in page.text  # of eight, two are fresh
    curves = EventAccumulator(str(out / "curves" / "chat"))
    curves.Reload()
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    expected = [(line["step"], line["loss"]["generative"]) for line in logged if "step" in line]
    drawn = [(one.step, one.value) for one in curves.Scalars("loss/generative")]
    assert drawn == [(step, pytest.approx(value)) for step, value in expected]
    (event,) = (out / "curves" / "chat").iterdir()
    before = (out / "report.html").read_text(encoding="utf-8")
    run_recipe(tiny_recipe(tmp_path), tmp_path / "data", out)  # has nothing left to do
    assert (out / "report.html").read_text(encoding="utf-8") == before and event.exists()


def test_trackers_that_are_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    assert choose_trackers(["tensorboard"], asked=False) == (
        [],
        "no curves while it runs: `pip install tensorboard` for them",
    )
    run_recipe(tiny_recipe(tmp_path), tmp_path / "data", tmp_path / "out")
    assert "visavis: no curves while it runs" in capsys.readouterr().err
    with pytest.raises(TrainError, match=r"asks for the tracker\(s\) wandb, .*pip install wandb"):
        recipe = tiny_recipe(tmp_path, trackers=["wandb"])
        run_recipe(recipe, tmp_path / "data", tmp_path / "other")


def test_float16_needs_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    recipe = tiny_recipe(tmp_path, precision="f16")
    with pytest.raises(TrainError, match="on GPUs only"):
        run_recipe(recipe, tmp_path / "data", tmp_path / "out")


def test_data_that_changed_is_refused(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, trackers=[])
    run_recipe(recipe, tmp_path / "data", tmp_path / "out")
    path = tmp_path / "data" / "chats.json"
    path.write_text(path.read_text().replace("picture 3", "a picture"))
    with pytest.raises(TrainError, match=r"fingerprint '\w+', this one has '\w+'"):
        run_recipe(recipe, tmp_path / "data", tmp_path / "out")


def test_matches_are_looked_up_among_distinct_targets() -> None:
    run = TinyRun()
    samples = matches(3)
    doubled = [*samples, *(type(one)(f"{one.id}-again", one.query, one.target) for one in samples)]
    rows = predict(loaded(run), run.contrastive(samples=doubled))
    assert {(row["of"], row["among"]) for row in rows} == {(6, 3)}
