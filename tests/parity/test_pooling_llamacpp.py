"""Embeddings of GGUF files as their keys say: pooling by the first token, eos appended."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import visavis
from tests.llamacpp import llama_cpp
from tests.mmproj_files import rewrite, tiny_llama
from visavis.checkpoints.checkpoint import Checkpoint
from visavis.checkpoints.gguf.architectures import PROFILE
from visavis.checkpoints.gguf.export import write_gguf
from visavis.errors import CheckpointError

pytestmark = pytest.mark.parity

TEXTS = ("ab word12 q", "word3 word4 c", "d")
POOLING, ADD_EOS = "llama.pooling_type", "tokenizer.ggml.add_eos_token"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llm")
    loaded: Checkpoint = tiny_llama(folder)
    return write_gguf(loaded, folder / "model.gguf", kind="F32")[0]


@pytest.mark.parametrize("pooling", [1, 2, 3])
@pytest.mark.parametrize("add_eos", [False, True])
def test_vectors_are_llama_cpps(pooling: int, add_eos: bool, written: Path, tmp_path: Path) -> None:
    changes = {PROFILE: None, POOLING: pooling, ADD_EOS: add_eos}
    path = rewrite(written, tmp_path / "embed.gguf", changes, {})
    ours = visavis.load(path, precision="f32", device="cpu")
    vectors = ours.embed(list(TEXTS))
    with llama_cpp(path, context_length=64, embedding=True) as server:
        for text, vector in zip(TEXTS, vectors, strict=True):
            found = server.post("/embedding", {"content": text})[0]["embedding"]
            theirs = np.asarray(found, np.float32).flatten()
            cosine = float(vector @ theirs / np.linalg.norm(theirs))
            assert cosine >= 0.9999, (text, cosine)
    out = write_gguf(ours, tmp_path / "again.gguf", kind="F32")[0]  # with the keys of the source
    again = visavis.load(out, precision="f32", device="cpu")
    assert np.abs(again.embed(list(TEXTS)) - vectors).max() < 1e-6
    assert again.specials.appended == ours.specials.appended


@pytest.mark.parametrize(("number", "name"), [(0, "none"), (4, "rank"), (9, "not known")])
def test_a_model_without_one_vector_is_refused(
    number: int, name: str, written: Path, tmp_path: Path
) -> None:
    changes = {PROFILE: None, POOLING: number, "tokenizer.chat_template": None}
    path = rewrite(written, tmp_path / "rank.gguf", changes, {})
    with pytest.raises(CheckpointError, match=f"pooling_type is {number} .{name}.*expected 1"):
        visavis.load(path, precision="f32", device="cpu")
