"""Hostile but plain files and names: an answer or one of our errors, and nothing else.

Each kind draws its cases from a seed. The default tests try a few of each; `make test-slow` tries
`VISAVIS_FUZZ_CASES` of them (default: 100,000 in all) and prints how many were tried by kind.
"""

from __future__ import annotations

import copy
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints.gguf.test_gguf import TOKENIZER as WORDS
from tests.data.data_files import opened, spec, write_tar
from tests.fakes import write_tiny_checkpoint
from tests.gguf_files import llama_metadata, tiny_config, write_llama
from visavis import load
from visavis.checkpoints.adapters import adapter_chain
from visavis.checkpoints.native import read_config, read_settings
from visavis.checkpoints.tensor_files import read_json, weight_files
from visavis.data.sources import open_data_source
from visavis.errors import VisavisError
from visavis.inputs import Prompt
from visavis.processing.media import frame_files, scan_media
from visavis.train.recipe import read_model, read_recipe

DEEP = 200_000
NAMES = [
    *("a" * 300, "b/" * 3000 + "c", "nul\0", "\ud800", "\udce9", "..", "", "/", "~nobody/x", "²"),
    *("9" * 5000, "a\nb", "%00", "\u202e", "ٱ" * 200, "/dev/zero", "/proc/self/mem"),
]
FAR = [name for name in NAMES if name not in ("", "..", "/")]  # no folder full of other files
TEXTS = [
    "[" * DEEP,
    '{"a":' * DEEP,
    "9" * 5000,
    "-" + "9" * 5000,
    "1e999999",
    "NaN",
    '"\\ud800"',
    "\ufeff{}",
    "",
    "\0",
    "{",
    "[[]]",
    "null",
    '{"a": 1, "a": 2}',
]
YAMLS = [
    *(text[:900] if text[:2] in ("[[", '{"') else text for text in TEXTS),
    "2001-99-99",
    "a: 2001-99-99",
    "2001-01-01T99:99:99",
    "- " * 900,
    "&a [*a]",
    "{" * 900,
    "!!python/object/apply:os.system [x]",
    "!!binary x",
    "!!int x",
    "? [a]\n: b",
    "a: &a [1]\nb: *c",
    "1:99:99",
    "0b",
    "0x",
    "=",
    "<<: 1",
    "\t",
    "%YAML 9",
]
NUMBERS: list[Any] = [0, -1, 2**31, 2**63, -(2**63), 10**400, 1e308, float("nan"), float("inf")]
VALUES: list[Any] = [
    *(None, True, "", "x", "9" * 5000, "\ud800", [], {}, [[]], {"a": {}}, 0.5, [None], "nul\0"),
    *NUMBERS,
    *NAMES[:4],
]
Case = Callable[[], object]


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*way, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*way, key))


def changed(whole: Any, draw: random.Random) -> Any:
    """Return a JSON document with one to three values replaced, dropped or renamed."""
    whole = json.loads(json.dumps(whole))
    for _ in range(draw.randint(1, 3)):
        way = draw.choice(list(places(whole)) or [()])
        if not way:
            return whole
        inner = whole
        for key in way[:-1]:
            inner = inner[key]
        action = draw.random()
        if action < 0.75 or not isinstance(inner, dict):
            inner[way[-1]] = copy.deepcopy(draw.choice(VALUES))
        elif action < 0.9:
            del inner[way[-1]]
        else:
            inner[draw.choice(NAMES)] = inner.pop(way[-1])
    return whole


def write_json(path: Path, value: Any, draw: random.Random) -> None:
    """Write a document, sometimes as one that is no JSON that can be read."""
    text = draw.choice(TEXTS) if draw.random() < 0.1 else json.dumps(value)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


# --- one function per kind: makes a case of a draw ------------------------------------------------


class Kinds:
    """Cases by kind; a folder of their own, reused."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "model"
        write_tiny_checkpoint(self.model)
        self.config = json.loads((self.model / "visavis.json").read_text())
        self.recipe = json.dumps(
            {
                "name": "a",
                "model": {"base": "nano"},
                "data": {"a": {"format": "llava", "path": "a.jsonl"}},
                "stages": [
                    {
                        "kind": "steps",
                        "name": "one",
                        "steps": 3,
                        "train": {"connector": 1e-3},
                        "generative": {"sources": {"a": {}}, "batch": 2},
                    }
                ],
            }
        )

    gguf = b""

    def native_config(self, draw: random.Random) -> None:
        """visavis.json with values of other types and ranges."""
        path = self.folder / "native"
        path.mkdir(exist_ok=True)
        write_json(path / "visavis.json", changed(self.config, draw), draw)
        read_settings(path, read_config(path))

    def json_files(self, draw: random.Random) -> None:
        """Settings files of any text."""
        path = self.folder / "any.json"
        path.write_bytes(draw.choice(TEXTS).encode("utf-8", "surrogatepass"))
        read_json(path)

    def weight_index(self, draw: random.Random) -> None:
        """Indexes that name shards which no file system has."""
        path = self.folder / "weights"
        path.mkdir(exist_ok=True)
        names = {f"w{i}": draw.choice([*NAMES, "a.safetensors", 3]) for i in range(3)}
        index = path / "model.safetensors.index.json"
        write_json(index, {"weight_map": names}, draw)
        weight_files(path)

    def adapters(self, draw: random.Random) -> None:
        """Adapters of bases that are no names, with settings of any value."""
        path = self.folder / "adapter"
        if not path.exists():
            path.mkdir()
            a, b = torch.ones(2, 4), torch.ones(4, 2)
            module = "base_model.model.x"
            save_file(
                {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b},
                path / "adapter_model.safetensors",
            )
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "x"}
        config |= {"rank_pattern": {"x": 2}, "alpha_pattern": {}, "bias": "none", "init": True}
        config["base_model_name_or_path"] = draw.choice([name for name in NAMES if name] + ["x"])
        write_json(path / "adapter_config.json", changed(config, draw), draw)
        adapter_chain(path, None)

    def recipes(self, draw: random.Random) -> None:
        """Recipes with dates that no calendar has, deep lists, and values of other types."""
        path = self.folder / "recipe.yaml"
        if draw.random() < 0.4:
            path.write_bytes(draw.choice(YAMLS).encode("utf-8", "surrogatepass"))
        else:
            write_json(path, changed(json.loads(self.recipe), draw), draw)
        read_recipe(path)

    def overrides(self, draw: random.Random) -> None:
        """Overrides of a recipe and of a model."""
        path = self.folder / "whole.yaml"
        path.write_text(self.recipe)
        keys = ["stages.0.steps", "name", "stages", "0", "²", "٣", "-1", "9" * 5000]
        keys += ["steps", "model", "", "data", "a", "\0"]
        name = ".".join(draw.choices(keys, k=draw.randint(1, 4)))
        setting = f"{name}{draw.choice(['=', '', '=='])}{draw.choice(YAMLS)}"
        draw.choice([lambda: read_recipe(path, [setting]), lambda: read_model([setting])])()

    def rows(self, draw: random.Random) -> None:
        """Rows of JSON lines, lists and tars, in every format that reads rows."""
        chat = [{"from": "human", "value": "<image>Who?"}, {"from": "gpt", "value": "A cat."}]
        said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
        said.append({"role": "assistant", "content": "A cat."})
        asked = [{"role": "user", "content": "<image>seen"}]
        form, row = draw.choice(
            [
                ("llava", {"id": 1, "image": "a.png", "conversations": chat}),
                ("llava", {"messages": said, "images": ["a.png"]}),
                ("pairs", {"query": "a", "positives": [{"image": "a.png"}], "negatives": ["b"]}),
                ("pairs", {"anchor": "a", "positive": "b", "negative_1": {"text": "c"}}),
                (
                    "pairs",
                    {
                        "messages": asked,
                        "images": ["a.png"],
                        "positive_messages": [asked],
                        "positive_images": [["b.png"]],
                    },
                ),
                ("mmeb", {"qry": "a", "qry_image_path": "a.png", "pos_text": "b"}),
                ("vidore", {"query": "a", "answer": "b", "image": "a.png"}),
                ("visrag", {"query": "a", "source": "b", "image": "a.png"}),
                ("llava-hound", {"id": 1, "video": "a", "conversations": chat}),
            ]
        )
        row = changed(row, draw)
        text = draw.choice(TEXTS) if draw.random() < 0.1 else json.dumps(row)
        raw = text.encode("utf-8", "surrogatepass")
        kind = draw.choice(["lines", "list", "tar"])
        name = {"lines": "a.jsonl", "list": "a.json", "tar": "a.tar"}[kind]
        path = self.folder / name
        if kind == "tar":
            write_tar(path, {"7.json": raw, "7.png": b"x"})
        else:
            path.write_bytes(raw + b"\n" if kind == "lines" else b"[" + raw + b"]")
        options = {"mode": "qa"} if form == "llava-hound" else {}
        source = open_data_source(spec(form, name, options=options), self.folder, name="mine")
        for number in range(len(source)):
            try:
                source[number]
            except VisavisError:
                assert source.id_of(number)
                raise

    def data_paths(self, draw: random.Random) -> None:
        """Names of data files that no file system has."""
        opened(self.folder, draw.choice(["llava", "pairs", "images"]), draw.choice(FAR))

    def media_names(self, draw: random.Random) -> None:
        """Names of images, videos and folders that no file system has."""
        name = draw.choice(FAR)
        kind = draw.choice(["image", "video", "document", "text"])
        path = Path(name) if draw.random() < 0.5 else self.folder / name
        draw.choice(
            [
                lambda: Prompt.of({kind: name}),
                lambda: Prompt.of(path),
                lambda: frame_files(path),
                lambda: scan_media(path),
            ]
        )()

    def gguf_tensors(self, draw: random.Random) -> None:
        """GGUF files whose tensors, of one dimension too, are of any type and shape."""
        path = self.folder / "model.gguf"
        if not self.gguf:
            config = tiny_config(vocab_size=len(WORDS["tokenizer.ggml.tokens"]))
            write_llama(path, config, llama_metadata(config) | WORDS)
            self.gguf = path.read_bytes()
        content = bytearray(self.gguf)
        for _ in range(draw.randint(1, 2)):
            name = draw.choice([b"output_norm.weight", b"blk.0.attn_norm.weight", b"blk.0.ffn_up"])
            at = content.index(name) + len(name) + (7 if name.endswith(b"up") else 0)
            dims = content[at]
            if draw.random() < 0.8:
                at += 4 + 8 * dims
                content[at : at + 4] = draw.choice([*range(40), 2**31]).to_bytes(4, "little")
            else:
                at += 4
                size = draw.choice([0, 1, 31, 33, 256, 2**31, 2**62, 2**64 - 1])
                content[at : at + 8] = size.to_bytes(8, "little")
        path.write_bytes(content)
        load(path, precision="f32", device="cpu").embed(["a"])

    def model_names(self, draw: random.Random) -> None:
        """Names of models that no file system has."""
        name = draw.choice(FAR)
        load(draw.choice([name, str(self.folder / name), f"{name}.gguf"]))


KINDS = [name for name, value in vars(Kinds).items() if callable(value) and name[0] != "_"]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Kinds:
    return Kinds(tmp_path_factory.mktemp("hostile"))


def attempt(kinds: Kinds, name: str, seeds: range) -> int:
    """Try cases; return how many were refused."""
    refused = 0
    for seed in seeds:
        try:
            getattr(kinds, name)(random.Random(f"{name} {seed}"))
        except VisavisError as error:
            assert len(str(error)) > 20, "say what was found and what to do"
            refused += 1
        except BaseException as error:
            error.add_note(f"case {name} {seed}")
            raise
    return refused


@pytest.mark.parametrize("name", KINDS)
def test_hostile_files_are_refused_or_read(kinds: Kinds, name: str) -> None:
    assert attempt(kinds, name, range(60)) > 5


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_many_hostile_files(kinds: Kinds, name: str, record_property: Any) -> None:
    cases = int(os.environ.get("VISAVIS_FUZZ_CASES", "100000")) // len(KINDS)
    began = time.monotonic()
    refused = attempt(kinds, name, range(1000, 1000 + cases))
    seconds = time.monotonic() - began
    print(f"\n{name}: {cases} cases, {refused} refused, {seconds:.0f} s")
