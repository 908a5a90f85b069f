"""Short names: the table, what they stand for, and a demo with one from a hub on this machine;
inspecting and converting a dual encoder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints.dual_encoder_files import save_dual_encoder
from tests.checkpoints.hub_server import hub_server
from tests.cli.conftest import Run
from tests.fakes import picture
from visavis import load
from visavis.checkpoints import hub
from visavis.checkpoints.formats import FORMATS, TARGETS
from visavis.checkpoints.known_models import known_models
from visavis.checkpoints.llava.config import is_llava
from visavis.checkpoints.load import NAMES
from visavis.processing.prompt_config import PROFILES

TASKS = {"chat", "embed", "video", "rerank"}


@pytest.mark.parametrize("name", known_models())
def test_every_row_is_whole_and_read(name: str) -> None:
    model = known_models()[name]
    assert name == name.lower() and "/" not in name
    assert model.licence and model.millions >= 50 and {*model.tasks} <= TASKS
    assert model.profile in ("", *PROFILES)
    if not model.hub:
        assert name in NAMES
        return
    wanted = hub.parse(model.hub)
    assert wanted is not None and wanted.repository == model.hub
    kinds = {kind for one in FORMATS for kind in one.model_types} | {"phi3_v", "tinyllava"}
    config = {"model_type": model.model_type, "mm_vision_tower": "x"}
    assert model.model_type in kinds or is_llava(config)


def test_the_table(run: Run) -> None:
    rows = json.loads(run("models", "--json").stdout)
    assert [row["name"] for row in rows] == list(known_models())
    (siglip,) = [row for row in rows if row["name"] == "siglip2-base"]
    assert siglip["hub"] == "google/siglip2-base-patch16-224"
    assert siglip["tasks"] == ["embed"] and siglip["licence"] == "Apache-2.0"
    shown = run("models").stdout
    assert all(row["name"] in shown and row["hub"] in shown for row in rows)


def visavis(cache: Path, endpoint: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own, with a hub of our own."""
    settings = {"HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        [sys.executable, "-m", "visavis", *words],
        env={**os.environ, **settings, "HF_HUB_ETAG_TIMEOUT": "2", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_a_short_name_is_fetched_from_the_hub(tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="sample pictures: pip install 'visavis[demo]'")
    root, cache = tmp_path / "hub", tmp_path / "cache"
    save_dual_encoder(root / known_models()["siglip2-base"].hub, "siglip 2")
    demo = ("demo", "--model", "siglip2-base", "--json", "--output", str(tmp_path / "demo"))
    with hub_server(root) as server:
        done = visavis(cache, server.url, *demo)
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        assert result["items"] > 5 and result["answer"] is None
        assert "model.safetensors" in server.sent
        gone = server.url
    again = visavis(cache, gone, "embed", "siglip2-base", "--text", "a cat")
    assert again.returncode == 0, "without a hub the cache is used" + again.stderr
    listed = visavis(cache, gone, "models", "--json")
    here = {row["name"] for row in json.loads(listed.stdout) if row["here"]}
    assert "siglip2-base" in here and "clip-vit-b32" not in here
    refused = visavis(tmp_path / "empty", gone, *demo)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    for expected in ("siglip2-base stands for google/", "the hub cannot be reached"):
        assert expected in refused.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("siglip") / "tiny-siglip"
    save_dual_encoder(folder, "siglip")
    return folder


def test_unknown_names_suggest_known_ones(run: Run) -> None:
    result = run("embed", "siglip2-bse", "--text", "a cat")
    assert result.exit_code == 2 and "siglip2-base" in result.output


def test_a_folder_of_that_name_wins(run: Run, tmp_path: Path) -> None:
    save_dual_encoder(tmp_path / "clip-vit-b32", "clip")
    result = run("inspect", "clip-vit-b32", "--json")
    assert json.loads(result.stdout)["path"] == "clip-vit-b32"


def test_inspect_and_convert(run: Run, folder: Path) -> None:
    facts = json.loads(run("inspect", folder, "--json").stdout)
    assert {part["part"] for part in facts["parts"]} == {
        "vision tower",
        "text tower",
        "embedding head",
    }
    assert facts["problems"] == [] and facts["kind"] == "dual_encoder"
    model = load(folder, precision="f32")
    for target in ("transformers", "native", "sentence-transformers"):
        options = ("--to", target, "--precision", "f32")
        result = run("convert", folder, target, *options, "--verify")
        assert result.exit_code == 0, result.output
        assert np.array_equal(
            load(target, precision="f32").embed(["red", picture(1)]),
            model.embed(["red", picture(1)]),
        )
    assert "zero-shot-image-classification" in Path("native/README.md").read_text()


@pytest.mark.parametrize("target", sorted(TARGETS.keys() - {"native", "sentence-transformers"}))
def test_formats_without_a_place_for_it(target: str, run: Run, folder: Path) -> None:
    if target == "transformers":
        return
    result = run("convert", folder, "out", "--to", target)
    assert result.exit_code == 2 and "embedding head" in result.output
    assert not Path("out").exists()
