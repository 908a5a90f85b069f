"""mmproj files: LLaVA 1.6's settings both ways, what cannot be written, and what cannot be read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as pil

from tests.fakes import write_tiny_checkpoint
from tests.gguf_files import tiny_config, write_llama
from tests.mmproj_files import SIGLIP, compose, rewrite, tiny_llama
from visavis.api import Model, load
from visavis.checkpoints.checkpoint import Checkpoint
from visavis.checkpoints.gguf.export import write_gguf as export
from visavis.checkpoints.gguf.mmproj import VISION, read_half
from visavis.checkpoints.gguf.reader import open_gguf
from visavis.checkpoints.load import load_checkpoint
from visavis.errors import CheckpointError, CheckpointWarning, InputError
from visavis.model.config import (
    ConnectorConfig,
    EfficientNetConfig,
    ImageLayoutConfig,
    TowerConfig,
)
from visavis.model.vlm import VLM
from visavis.processing.config import AnyresConfig

GRIDS = ((32, 64), (64, 32), (64, 64))
SPATIAL = ImageLayoutConfig("spatial", unpad=True, newline=True)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_llama(tmp_path_factory.mktemp("llm"))


@pytest.fixture
def composed(language_model: Checkpoint) -> Checkpoint:
    return compose(language_model, "SigLIP, mlp2x")


def with_tiles(loaded: Checkpoint, merge: ImageLayoutConfig = SPATIAL) -> Checkpoint:
    """Return LLaVA 1.6 of the same parts."""
    torch.manual_seed(0)
    vlm = VLM(replace(loaded.vlm.config, merge=merge))
    vlm.load_state_dict(loaded.vlm.state_dict() | {"image_newline": torch.randn(32)})
    assert loaded.processor is not None
    processor = replace(loaded.processor, resize="squash", tiles=AnyresConfig(GRIDS))
    return replace(loaded, vlm=vlm.eval().requires_grad_(False), processor=processor)


def test_llava_1_6_both_ways(composed: Checkpoint, tmp_path: Path) -> None:
    loaded = with_tiles(composed)
    model, mmproj = export(loaded, tmp_path / "ours", kind="F32")
    keys = open_gguf(mmproj).metadata
    assert keys["clip.vision.mm_patch_merge_type"] == "spatial_unpad"
    assert keys["clip.vision.image_grid_pinpoints"].tolist() == [32, 64, 64, 32, 64, 64]
    old = {"v.image_newline": "model.image_newline"}  # in llama.cpp's first files
    foreign = rewrite(mmproj, tmp_path / "foreign.gguf", {VISION: None}, old)
    picture = pil.fromarray(np.random.default_rng(1).integers(0, 256, (40, 90, 3), np.uint8))
    expected = Model.of(loaded).embed([picture])
    for file in (mmproj, foreign):
        again = load(model, vision_tower=file, precision="f32", device="cpu")
        assert again.vlm.config.merge == SPATIAL and again.processor.tiles.grids == GRIDS
        assert np.abs(again.embed([picture]) - expected).max() < 1e-5


def test_what_llama_cpp_cannot_run_is_refused_by_name(composed: Checkpoint, tmp_path: Path) -> None:
    def refusal(loaded: Any) -> str:
        with pytest.raises(CheckpointError) as raised:
            export(loaded, tmp_path / "out", kind="F16")
        assert not (tmp_path / "out").exists()
        return str(raised.value)

    def altered(tower: TowerConfig = SIGLIP, max_tiles: int = 0, **connector: Any) -> Checkpoint:
        fields = {"kind": "mlp", "in_width": tower.width, "out_width": 32, "depth": 2} | connector
        merge = replace(SPATIAL, max_tiles=max_tiles) if max_tiles else ImageLayoutConfig()
        config = replace(
            composed.vlm.config, tower=tower, connector=ConnectorConfig(**fields), merge=merge
        )
        with torch.device("meta"):
            return replace(composed, vlm=VLM(config))

    assert "'efficientnet_lite'" in refusal(altered(EfficientNetConfig(0, 64)))  # nano's
    assert "register tokens" in refusal(altered(replace(SIGLIP, class_token=True, num_registers=4)))
    assert "pixel shuffle" in refusal(altered(shuffle=2))
    assert "a norm before the connector" in refusal(altered(input_norm=True))
    assert "of kind 'mlp' and depth 3" in refusal(altered(depth=3))
    assert "anyres_max" in refusal(altered(max_tiles=9))
    both = refusal(altered(shuffle=2, input_norm=True))
    assert "pixel shuffle" in both and "a norm before" in both
    assert "expected a CLIP, SigLIP or DINOv2 tower" in both


def test_an_embedding_head_has_no_place(tmp_path: Path) -> None:
    loaded = load_checkpoint(write_tiny_checkpoint(tmp_path / "tiny"), device="cpu")
    with pytest.raises(CheckpointError, match="has an embedding head, which GGUF has no place for"):
        export(loaded, tmp_path, kind="F16")


@pytest.fixture
def files(composed: Checkpoint, tmp_path: Path) -> tuple[Path, Path]:
    model, mmproj = export(composed, tmp_path / "good", kind="F32")
    return model, mmproj


WIDTH, LAYER = "clip.vision.embedding_length", "clip.vision.feature_layer"
BAD: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "projector": ({"clip.projector_type": "ldpv2"}, {}, "of type 'ldpv2', expected 'mlp'"),
    "no width": ({WIDTH: None}, {}, f"'{WIDTH}' is None, expected a positive int"),
    "width": ({WIDTH: 33}, {}, "expected a width of 2 whole heads"),
    "huge": ({WIDTH: 2**31}, {}, "expected a positive int"),
    "layer": ({LAYER: np.array([7], np.int32)}, {}, "expected one number of 1 to 2"),
    "layers": ({LAYER: np.array([1, 2], np.int32)}, {}, "expected one number of 1 to 2"),
    "mean": (
        {"clip.vision.image_mean": np.zeros(2, np.float32), VISION: None},
        {},
        "expected three numbers",
    ),
    "size": ({"clip.vision.image_size": 64}, {}, "v.position_embd.weight has shape (16, 32)"),
    "ours": ({VISION: "{}"}, {}, "how pictures are prepared cannot be read"),
    "no mm.2": ({}, {"mm.2.weight": "mm.3.weight"}, "no mm.0.weight and mm.2.weight"),
    "missing": ({}, {"v.blk.1.ln2.bias": "v.x"}, "missing v.blk.1.ln2.bias; unexpected v.x"),
    "final norm": ({}, {"v.blk.1.ln2.bias": "v.post_ln.bias"}, "unexpected v.post_ln.bias"),
}


@pytest.mark.parametrize(("changes", "names", "message"), BAD.values(), ids=BAD)
def test_bad_files_are_named(
    changes: dict[str, Any],
    names: dict[str, str],
    message: str,
    files: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    path = rewrite(files[1], tmp_path / "bad.gguf", changes, names)
    with pytest.raises(CheckpointError) as raised:
        read_half(open_gguf(path))
    assert message in str(raised.value) and str(path) in str(raised.value)


def test_values_that_are_not_finite_are_warned_of(composed: Checkpoint, tmp_path: Path) -> None:
    composed.vlm.connector.layers[2].bias.fill_(torch.nan)  # type: ignore[union-attr]
    export(composed, tmp_path, kind="F32")
    with pytest.warns(CheckpointWarning, match=r"mm\.2\.bias of .* holds NaN"):
        load_checkpoint(tmp_path)


def test_halves_that_do_not_belong_together(files: tuple[Path, Path], tmp_path: Path) -> None:
    model, mmproj = files
    narrow = write_llama(tmp_path / "narrow.gguf", tiny_config(width=16))
    with pytest.raises(CheckpointError, match="tokens of width 32, but .* is 16 wide"):
        load_checkpoint(narrow, vision_tower=mmproj)
    with pytest.raises(CheckpointError, match="'llama', expected 'clip', the vision half"):
        load_checkpoint(model, vision_tower=model)
    with pytest.raises(CheckpointError, match="is the vision half of a model"):
        load_checkpoint(mmproj)
    with pytest.raises(InputError, match="base was given"):
        load_checkpoint(model, base=model)


def test_a_folder_must_leave_no_choice(files: tuple[Path, Path], tmp_path: Path) -> None:
    model, mmproj = files
    assert load_checkpoint(model.parent).processor is not None
    second = model.with_name("another.gguf")
    second.write_bytes(mmproj.read_bytes())
    with pytest.raises(CheckpointError, match="1 language models and 2 vision halves"):
        load_checkpoint(model.parent)
    second.write_bytes(model.read_bytes())
    with pytest.raises(CheckpointError, match="2 language models and 1 vision halves"):
        load_checkpoint(model.parent)
    mmproj.unlink()
    second.unlink()
    assert load_checkpoint(model.parent).processor is None
