"""`visavis convert`: every layout, whole or not at all, and one line for whatever is wrong."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import visavis
from tests.checkpoints.transformers_files import save_llava, save_qwen2
from tests.cli.conftest import Run
from tests.cli.test_bad_input import assert_one_line
from tests.fakes import picture, tiny_model, write_tiny_checkpoint
from tests.parity.test_gguf_families import build_peer
from tests.parity.test_gguf_families import write as write_gguf_file
from visavis.checkpoints.load import NANO_FOLDER, load_checkpoint
from visavis.checkpoints.native import write_native
from visavis.convert import conversion as conversion
from visavis.convert import verify

ITEMS = [{"image": picture(1), "text": "red"}, "a text alone", picture(2)]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    save_qwen2(folder)
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    save_llava(folder)
    return folder


def load(path: Path | str, **settings: Any) -> visavis.Model:
    return visavis.load(path, precision="f32", device="cpu", **settings)


def logits(model: visavis.Model) -> np.ndarray:
    return model.trace("What is this?").logits


def test_native_gives_the_same_vectors(run: Run, tiny: str, tmp_path: Path) -> None:
    result = run("convert", tiny, "out", "--to", "native", "--verify")
    assert result.exit_code == 0, result.output
    assert "native" in result.stdout and "opened by visavis again" in result.stdout
    ours, again = load(tiny), load(tmp_path / "out")
    assert np.array_equal(ours.embed(ITEMS), again.embed(ITEMS))
    assert ours.specials == again.specials and ours.profile == again.profile
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_precision_is_that_of_the_source_or_asked_for(run: Run, tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path / "in")
    for asked, expected in (("auto", torch.float32), ("f16", torch.float16)):
        whole = run("convert", model, asked, "--to", "native", "--precision", asked, "--json")
        assert json.loads(whole.stdout)["precision"] == {"auto": "f32"}.get(asked, asked)
        tensors = load_file(tmp_path / asked / "model.safetensors")
        assert tensors["decoder.embed.weight"].dtype == expected
        assert tensors["decoder.norm.weight"].dtype == torch.float32  # as it is computed with
    assert conversion.stored_precision(tmp_path / "f16") == "f16"
    assert conversion.stored_precision(NANO_FOLDER) == "bf16"  # its base is quantised


def test_every_layout_of_a_llava(run: Run, llava: Path, tmp_path: Path) -> None:
    expected = logits(load(llava))
    for to in ("native", "transformers", "llava", "sentence-transformers"):
        result = run("convert", llava, to, "--to", to, "--json")
        assert result.exit_code == 0, result.output
        summary = json.loads(result.stdout)
        names = [Path(name).name for name in summary["files"]]
        assert {"README.md", "model.safetensors", "tokenizer.json"} <= set(names)
        assert summary["bytes"] == sum(
            path.stat().st_size for path in (tmp_path / to).rglob("*") if path.is_file()
        )
        found = load(tmp_path / to)
        if to == "llava":  # whose readers take Qwen's own chat format
            assert summary["lost"] and "qwen_1_5" in summary["lost"][0]
        else:
            assert np.abs(logits(found) - expected).max() < 1e-4


def test_tinyllava(run: Run, llava: Path, tmp_path: Path) -> None:
    result = run("convert", llava, "out", "--to", "tinyllava", "--chat-template", "qwen_1_5")
    assert result.exit_code == 0, result.output
    assert load(tmp_path / "out").takes_images


@pytest.mark.parity
def test_verify_asks_transformers_itself(run: Run, llava: Path, tmp_path: Path) -> None:
    result = run("convert", llava, "out", "--to", "transformers", "--verify", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["verify"]
    assert found["asked"] == "transformers and visavis again" and found["same"]
    named = {check["name"]: check for check in found["checks"]}
    assert {"transformers: text 1", "transformers: image of blocks"} <= named.keys()
    assert all(check["cosine"] > 0.99999 and check["kl"] < 1e-6 for check in named.values())


def test_verify_notices(
    run: Run, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_reload", lambda done: tiny_model(seed=1))
    result = run("convert", tiny, "out", "--to", "native", "--verify")
    assert result.exit_code == 1
    assert "differ from those of" in result.stderr and "visavis: text 1" in result.stderr
    assert "differs" in result.stdout
    monkeypatch.setattr(verify, "_reload", lambda done: 1 / 0)
    result = run("convert", tiny, "other", "--to", "native", "--verify")
    assert result.exit_code == 1 and "cannot use it (ZeroDivisionError" in result.stderr


@pytest.mark.parity
def test_gguf_as_a_folder_and_as_a_file(run: Run, tmp_path: Path) -> None:
    source = write_gguf_file(tmp_path / "source.gguf", "llama", build_peer("llama"))
    words = ("convert", source, "--to", "gguf")
    result = run(*words, "folder", "--kind", "f32", "--verify", "--json")
    assert result.exit_code == 0, result.output
    whole = json.loads(result.stdout)
    assert whole["files"] == ["folder/README.md", "folder/model.gguf"]
    if find_spec("xllamacpp"):
        assert whole["verify"]["asked"] == "llama.cpp and visavis again"
    result = run(*words, "model.gguf", "--kind", "F16", "--json")
    assert json.loads(result.stdout)["files"] == ["model.gguf"]
    assert np.abs(logits(load("model.gguf")) - logits(load(source))).max() < 0.05
    assert_one_line(run(*words, "model.gguf"), "model.gguf exists", "--force")
    assert run(*words, "model.gguf", "--force").exit_code == 0
    assert_one_line(run(*words, "x.gguf", "--kind", "Q9"), "Q9")
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "model.gguf", "source.gguf"}


def test_an_adapter_is_merged(run: Run, qwen: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    torch.manual_seed(0)
    pair = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{name}.weight": torch.randn(*shape)
        for name, shape in (("A", (4, 32)), ("B", (32, 4)))
    }
    save_file(pair, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "a/base"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    expected = logits(load(adapter, base=qwen))
    assert np.abs(expected - logits(load(qwen))).max() > 0.01
    first = run("convert", qwen, "one", "--to", "transformers", "--merge-adapter", adapter)
    second = run("convert", adapter, "two", "--to", "native", "--base", qwen)
    assert first.exit_code == second.exit_code == 0, first.output + second.output
    for name in ("one", "two"):
        assert np.abs(logits(load(tmp_path / name)) - expected).max() < 1e-5
    both = ("--merge-adapter", adapter, "--base", qwen)
    assert_one_line(run("convert", qwen, "three", "--to", "native", *both), "given together")


def test_the_card_says_what_is_known(run: Run, qwen: Path, tmp_path: Path) -> None:
    run("convert", qwen, "plain", "--to", "transformers")
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "**Fill this in**" in card and "license:" not in card
    assert load(qwen).fingerprint in card and "AutoModelForCausalLM" in card
    write_native(load_checkpoint(qwen, precision="f32"), tmp_path / "plain")
    licensed = tmp_path / "plain"
    (licensed / "README.md").write_text("---\nlicense: mit\n---\nwords\n")
    (licensed / "LICENSE").write_text("the words of the licence")
    run("convert", licensed, "out", "--to", "native")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n") and "`mit`, as the source" in card
    assert (tmp_path / "out" / "LICENSE").read_text() == "the words of the licence"


# --- what is wrong --------------------------------------------------------------------------------


def test_unknown_layouts_and_parts_without_words(run: Run, tiny: str, tmp_path: Path) -> None:
    result = run("convert", tiny, "out", "--to", "transformer")
    assert_one_line(result, "unknown layout", "did you mean 'transformers'")
    for to in ("transformers", "llava"):
        result = run("convert", tiny, "out", "--to", to)
        assert_one_line(result, "the embedding head", "--to native")
    result = run("convert", tiny, "out", "--to", "native", "--kind", "Q8_0")
    assert_one_line(result, "has no kinds")
    assert_one_line(run("convert", tiny, "out", "--to", "native", "--precision", "f12"), "f12")
    assert_one_line(run("convert", "nanno", "out", "--to", "native"), "did you mean 'nano'")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_taken(run: Run, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert_one_line(run("convert", tiny, "file", "--to", "native"), "is a file")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    words = ("convert", tiny, "notes", "--to", "native")
    assert_one_line(run(*words), "not empty", "--force")
    assert_one_line(run(*words, "--force"), "something else than a model")
    assert (tmp_path / "notes" / "diary.txt").read_text() == "dear diary"
    assert run("convert", tiny, "out", "--to", "native").exit_code == 0
    (tmp_path / "out" / "old").touch()
    assert run("convert", tiny, "out", "--to", "native", "--force").exit_code == 0
    assert not (tmp_path / "out" / "old").exists() and load(tmp_path / "out").name == "tiny"
    for place in ("out", "."):
        result = run("convert", tmp_path / "out", place, "--to", "native", "--force")
        assert_one_line(result, "holds the model to convert")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "notes", "out"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("force", [False, True])
def test_nothing_is_left_half_written(
    run: Run, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any, force: bool
) -> None:
    before = sorted(run("convert", tiny, "out", "--to", "native").stdout) if force else []

    def fail(*_: object) -> str:
        raise error

    monkeypatch.setattr(conversion, "model_card", fail)  # after all tensors were written
    result = run("convert", tiny, "out", "--to", "native", *(["--force"] if force else []))
    if error is KeyboardInterrupt:
        assert result.exit_code == 130
    else:
        assert_one_line(result, "No space left", "nothing was left")
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if before else [])
    if force:
        assert load(tmp_path / "out").name == "tiny"


@pytest.mark.skipif(sys.platform == "win32", reason="needs Unix' limits of file sizes")
def test_a_full_disk(tiny: str, tmp_path: Path) -> None:
    """The system refuses to write beyond some size, as it does on a full disk."""
    script = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "from visavis.cli import main\n"
        f"sys.argv = ['visavis', 'convert', {tiny!r}, 'out', '--to', 'native']\n"
        "main()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1 and "cannot write out" in result.stderr
    assert list(tmp_path.iterdir()) == []


CONVERTER = """
import sys
from visavis.convert import convert
print("ready", flush=True)
while True:
    convert(sys.argv[1], sys.argv[2], to=sys.argv[3], force=True)
"""


@pytest.mark.slow
def test_killed_conversions_leave_a_whole_model(run: Run, tiny: str, tmp_path: Path) -> None:
    """OUT loads after each kill, and the next conversion removes what killed ones have left."""
    out = tmp_path / "out"
    words = ("convert", tiny, out, "--to", "native", "--force")
    assert run(*words).exit_code == 0
    draw = random.Random(0)
    for _ in range(12):
        command = [sys.executable, "-c", CONVERTER, tiny, str(out), "native"]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(draw.uniform(0, 0.5))
        writer.kill()
        writer.communicate()
        assert load(out).num_parameters > 0
    assert run(*words).exit_code == 0
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())
