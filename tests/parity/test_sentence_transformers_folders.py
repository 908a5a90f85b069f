"""Embedder folders that sentence-transformers saved: names without `model.`, pooling, no chat; and
config.json that says it is not quantised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2Model

import visavis
from tests.checkpoints.transformers_files import CHATML, TEXT, fast_tokenizer, save_qwen2
from tests.parity.peers import randomized
from visavis.errors import CheckpointError, InputError

pytest.importorskip("sentence_transformers", reason="visavis[dev] has it")
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

pytestmark = pytest.mark.parity

TEXTS = ["a cat", "What is it?", "two dogs run over a green field"]


def save_embedder(
    folder: Path, pooling: str, template: str = "", **config: Any
) -> SentenceTransformer:
    """Write a tiny embedder as sentence-transformers does; return it."""
    plain = folder.with_name("plain")
    model = Qwen2Model(Qwen2Config(**TEXT | config))
    randomized(model)
    model.save_pretrained(plain)
    tokenizer = fast_tokenizer()
    tokenizer.chat_template = template or None
    tokenizer.save_pretrained(plain)
    transformer = Transformer(str(plain), model_kwargs={"dtype": torch.float32})
    width = transformer.get_embedding_dimension()
    peer = SentenceTransformer(
        modules=[transformer, Pooling(width, pooling), Normalize()], device="cpu"
    )
    peer.save(str(folder))
    return peer


@pytest.mark.parametrize("pooling", ["lasttoken", "mean", "cls"])
def test_vectors(pooling: str, tmp_path: Path) -> None:
    peer = save_embedder(tmp_path / "saved", pooling, tie_word_embeddings=False)
    ours = visavis.load(tmp_path / "saved", precision="f32")
    assert np.abs(ours.embed(TEXTS) - peer.encode(TEXTS)).max() < 1e-5
    with pytest.raises(InputError, match="brings no chat template"):
        ours.chat("Hello")


def test_names_with_and_without_the_prefix(tmp_path: Path) -> None:
    save_embedder(tmp_path / "saved", "mean")
    wanted = visavis.load(tmp_path / "saved", precision="f32").embed(TEXTS)
    whole = Qwen2ForCausalLM.from_pretrained(tmp_path / "plain")
    whole.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["architectures"] == [
        "Qwen2ForCausalLM"
    ]
    found = visavis.load(tmp_path / "saved", precision="f32").embed(TEXTS)
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "sentence_transformers.models.Dense", "path": "2_Dense"}, "a module 'Dense'"),
        ({"type": "x.Pooling", "path": "../.."}, r"module 'Pooling' in '\.\./\.\.'"),
        ({"type": "x.Pooling", "path": "nowhere"}, "nowhere"),
    ],
)
def test_modules_that_are_not_read(change: dict[str, str], message: str, tmp_path: Path) -> None:
    save_embedder(tmp_path / "saved", "mean")
    path = tmp_path / "saved/modules.json"
    path.write_text(json.dumps([*json.loads(path.read_text()), change]))
    with pytest.raises(CheckpointError, match=message):
        visavis.load(path.parent)
    path.write_text("{}")
    with pytest.raises(CheckpointError, match="expected a list of modules"):
        visavis.load(path.parent)


def test_texts_in_a_chat_template_are_refused(tmp_path: Path) -> None:
    save_embedder(tmp_path / "saved", "mean", CHATML)
    with pytest.raises(CheckpointError, match="puts every text into the chat template"):
        visavis.load(tmp_path / "saved")


def test_pooling_that_is_not_read(tmp_path: Path) -> None:
    save_embedder(tmp_path / "saved", "max")
    with pytest.raises(CheckpointError, match="pools by max, expected one of lasttoken, cls, mean"):
        visavis.load(tmp_path / "saved")


@pytest.mark.parametrize("value", [None, {}])
def test_null_is_not_quantised(value: Any, tmp_path: Path) -> None:
    save_qwen2(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": value}))
    assert visavis.load(tmp_path).chat("Hello", max_new_tokens=2).text is not None
    path.write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(CheckpointError, match="quantised by 'awq'"):
        visavis.load(tmp_path)


def test_add_eos_token_beside_a_tokenizer_json_is_not_looked_at(tmp_path: Path) -> None:
    """As in transformers, where tokenizer.json's own post-processor decides."""
    save_qwen2(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_eos_token": True}))
    ours = visavis.load(tmp_path).prepare(visavis.Prompt.of("a cat")).token_ids
    assert list(ours) == AutoTokenizer.from_pretrained(tmp_path)("a cat")["input_ids"]
