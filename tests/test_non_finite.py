"""NaN and infinity never leave a model as a vector, an answer or JSON: an error names the item."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import visavis
from tests.fakes import picture, write_pictures, write_tiny_checkpoint
from visavis.api import Model
from visavis.cli import app
from visavis.cli.common import print_json
from visavis.convert.verify import Answer, cosine, divergence
from visavis.errors import CheckpointWarning, InputError, NonFiniteError
from visavis.index import Index

pytestmark = pytest.mark.filterwarnings(f"ignore::{CheckpointWarning.__module__}.CheckpointWarning")


def damaged(folder: Path, number: float, match: str, row: int | None = None) -> Path:
    """Write a checkpoint with one number in the tensors whose name holds `match`."""
    path = write_tiny_checkpoint(folder)
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    chosen = [name for name in tensors if match in name]
    assert chosen
    for name in chosen:
        if row is None:
            tensors[name][..., :1] = number
        else:
            tensors[name][row] = number
    save_file(tensors, file)
    return path


def load(path: Path, precision: str = "f32") -> Model:
    return visavis.load(path, precision=precision, device="cpu")


DAMAGES = [
    (float("nan"), "decoder.blocks.0.down"),
    (float("inf"), "decoder.blocks.0.up"),
    (float("-inf"), "decoder.blocks.0.attn_norm"),
    (1e38, "decoder.blocks.0.qkv"),
]


@pytest.mark.parametrize(("number", "match"), DAMAGES)
@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_a_damaged_decoder_neither_answers_nor_embeds(
    tmp_path: Path, number: float, match: str, precision: str
) -> None:
    model = load(damaged(tmp_path, number, match), precision)
    for options in ({}, {"temperature": 1.0, "seed": 1}, {"beams": 2}, {"stream": True}):
        if number == 1e38:
            break  # a large weight is not damaged for all inputs
        with pytest.raises(NonFiniteError, match="logits are NaN or infinite after 0 tokens"):
            "".join(model.chat("hello", max_new_tokens=3, **options))  # type: ignore[arg-type]
    if number == 1e38:
        assert np.isfinite(_vectors_or_none(model)).all()
        return
    with pytest.raises(NonFiniteError, match=r"item 1 of 2 \('one'\) and 1 more"):
        model.embed(["one", "two"])
    with pytest.raises(NonFiniteError, match=r"prompt 1 of 2 \('one'\)"):
        model.chat_many(["one", "two"], max_new_tokens=2)


def _vectors_or_none(model: Model) -> np.ndarray:
    try:
        return model.embed(["one", "two"])
    except NonFiniteError:
        return np.zeros((0, 1))


def one_bad_byte(folder: Path) -> Model:
    """Return a model that gives NaN for texts with the letter q."""
    path = write_tiny_checkpoint(folder)
    model = load(path)
    token = model.tokenizer.token_to_id("q")
    with torch.no_grad():
        model.vlm.decoder.embed.weight[token] = float("nan")
    return model


def test_one_of_many_is_named(tmp_path: Path) -> None:
    model = one_bad_byte(tmp_path)
    with pytest.raises(NonFiniteError, match=r"item 3 of 4 \('a q is here'\): its vector"):
        model.embed(["one", "two", "a q is here", "four"])
    assert np.isfinite(model.embed(["one", "two", "four"])).all()


def test_a_tower_of_nan_is_named_by_its_image(tmp_path: Path) -> None:
    model = load(damaged(tmp_path / "model", float("nan"), "tower"))
    (path,) = write_pictures(tmp_path / "images", 1)
    with pytest.raises(NonFiniteError, match=path.name):
        model.embed(["fine", path])
    with pytest.raises(NonFiniteError, match="logits"):
        model.chat("what?", [picture(1)], max_new_tokens=2)
    assert np.isfinite(model.embed(["fine"])).all()


def test_an_index_takes_the_others_and_lists_the_one(tmp_path: Path) -> None:
    model = one_bad_byte(tmp_path / "model")
    with Index(tmp_path / "photos.visavis", model) as index:
        report = index.add([{"text": text} for text in ("one", "a quay", "two")])
        assert report.added == 2
        ((source, reason),) = report.failed
        assert source == "a quay" and "NaN" in reason
        assert len(index.search("two")) == 2
        with pytest.raises(NonFiniteError, match="quay"):
            index.search("quay")


VECTOR_OF = "SELECT vector FROM items WHERE source = ?"


def test_a_vector_of_nan_in_an_index_is_named(tmp_path: Path) -> None:
    model, path = load(write_tiny_checkpoint(tmp_path / "model")), tmp_path / "old.visavis"
    with Index(path, model) as index:
        index.add([{"text": "one"}, {"text": "two"}])
    with sqlite3.connect(path) as connection:
        bad = np.full(model.embedding_dim, np.nan, "<f4").tobytes()
        connection.execute(f"UPDATE vectors SET vector = ? WHERE id = ({VECTOR_OF})", (bad, "two"))
    connection.close()
    with Index(path, model) as index:
        with pytest.raises(NonFiniteError, match="the vector of two"):
            index.search("one")
        index.add([{"text": "two", "source": "copy"}])  # embedded again, not copied
        index.add([{"text": "two"}])
    with sqlite3.connect(path) as connection:
        query = f"SELECT vector FROM vectors WHERE id = ({VECTOR_OF})"
        (found,) = connection.execute(query, ("copy",)).fetchone()
    connection.close()
    assert np.isfinite(np.frombuffer(found, "<f4")).all()


@pytest.mark.parametrize(
    "command", [["embed", "MODEL", "--text", "hi"], ["chat", "MODEL", "hi", "--json"]]
)
def test_the_command_line_prints_one_line(tmp_path: Path, command: list[str]) -> None:
    path = damaged(tmp_path, float("nan"), "decoder.blocks.0.down")
    found = CliRunner().invoke(app, [str(path) if one == "MODEL" else one for one in command])
    assert found.exit_code == 2
    assert "NaN" not in found.stdout and "NaN" in found.stderr


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_json_is_refused_with_its_place(number: float, capsys: Any) -> None:
    with pytest.raises(NonFiniteError, match=r"rows\[1\]\.score is -?(nan|inf)"):
        print_json({"rows": [{"score": 1.0}, {"score": number}]})
    assert capsys.readouterr().out == ""
    print_json({"rows": [{"score": 1.0}]})
    assert json.loads(capsys.readouterr().out) == {"rows": [{"score": 1.0}]}


@pytest.mark.parametrize("bias", [float("nan"), float("inf")])
def test_a_bias_is_a_number(tmp_path: Path, bias: float) -> None:
    model = load(write_tiny_checkpoint(tmp_path))
    with pytest.raises(InputError, match="logit_bias of the token 5"):
        model.chat("hi", max_new_tokens=2, logit_bias={5: bias})


def test_nan_is_no_likeness() -> None:
    fine, nan = np.ones(4, np.float32), np.full(4, np.nan, np.float32)
    first = Answer(vector=fine, hidden=fine, log_probs=fine)
    near = cosine(first, Answer(vector=fine, hidden=nan, log_probs=fine))
    assert near is not None and np.isnan(near)
    assert divergence(first, Answer(vector=fine, hidden=fine, log_probs=nan)) == float("inf")
