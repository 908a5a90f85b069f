"""What `convert --to sentence-transformers` writes, opened by sentence-transformers: the vectors of
`Model.embed`, for texts, pictures and both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import visavis
from tests.checkpoints.transformers_files import save_qwen2
from tests.fakes import picture, write_tiny_checkpoint
from visavis.convert import convert

pytestmark = pytest.mark.parity

sentence_transformers = pytest.importorskip(
    "sentence_transformers", reason="needs sentence-transformers (visavis[dev])"
)
ITEMS = ["a cat", {"image": picture(2), "text": "what?"}, picture(1), "a longer text " * 5]


def opened(folder: Path, **settings: Any) -> Any:
    return sentence_transformers.SentenceTransformer(
        str(folder),
        trust_remote_code=True,
        device="cpu",
        local_files_only=True,
        model_kwargs={"precision": "f32"},
        **settings,
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, visavis.Model, Path]:
    folder = tmp_path_factory.mktemp("st")
    source = write_tiny_checkpoint(folder / "in")
    convert(source, folder / "out", to="sentence-transformers")
    ours = visavis.load(source, precision="f32", device="cpu")
    return opened(folder / "out"), ours, folder / "out"


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_texts_pictures_and_both(both: tuple) -> None:
    model, ours, _ = both
    assert_same(model.encode(ITEMS), ours.embed(ITEMS))
    for item in ITEMS:
        assert_same(model.encode([item]), ours.embed([item]))
    assert_same(model.encode(ITEMS, batch_size=2), ours.embed(ITEMS))
    assert_same(model.encode("a cat"), ours.embed("a cat")[0])


def test_a_file_name_is_a_picture_here(both: tuple, tmp_path: Path) -> None:
    model, ours, _ = both
    picture(1).save(tmp_path / "p.png")
    assert_same(model.encode([str(tmp_path / "p.png")]), ours.embed([picture(1)]))


def test_prompts_are_instructions(both: tuple) -> None:
    model, ours, _ = both
    found = model.encode(ITEMS[:2], prompt="Find the same:")
    assert_same(found, ours.embed(ITEMS[:2], instruction="Find the same:"))


def test_fewer_dimensions(both: tuple) -> None:
    model, ours, _ = both
    found = model.encode(ITEMS, truncate_dim=8, normalize_embeddings=True)
    assert_same(found, ours.embed(ITEMS, dim=8))


def test_what_it_says_of_itself(both: tuple) -> None:
    model, ours, _ = both
    assert model.get_embedding_dimension() == ours.embedding_dim == 16
    assert model.supports("image") and model.supports(("image", "text"))
    assert model.max_seq_length == ours.context_length
    first = model.encode(["a", "a"], convert_to_tensor=True)
    assert torch.allclose(model.similarity(first, first), torch.ones(2, 2))


def test_saved_again_it_is_the_same(both: tuple, tmp_path: Path) -> None:
    model, ours, folder = both
    model.save(str(tmp_path / "again"))
    assert_same(opened(tmp_path / "again").encode(ITEMS), ours.embed(ITEMS))
    assert_same(visavis.load(folder, precision="f32").embed(ITEMS), ours.embed(ITEMS))


def test_a_language_model_alone(tmp_path: Path) -> None:
    save_qwen2(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out", to="sentence-transformers")
    model = opened(tmp_path / "out")
    expected = visavis.load(tmp_path / "in", precision="f32", device="cpu")
    assert_same(model.encode(["a", "b c"]), expected.embed(["a", "b c"]))
    assert not model.supports("image")
    with pytest.raises(ValueError, match="image"):
        model.encode([picture(1)])
