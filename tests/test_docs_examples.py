"""The pages on adding a model, carried out: edits in a copy of the package, and examples run.

What the edited package computes is compared with a stock peer whose tensors were renamed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from tests.checkpoints.transformers_files import TEXT, fast_tokenizer
from tests.parity.peers import assert_close, randomized

REPOSITORY = Path(__file__).parents[1]
EDIT = re.compile(r"<!-- goes (below|above) `(.+?)` in (\S+) -->\n```python\n(.*?)```", re.DOTALL)
EXAMPLE = re.compile(
    r"<!-- executed by tests/test_docs_examples.py -->\n```python\n(.*?)```", re.DOTALL
)


def edited_package(page: str, folder: Path) -> Path:
    """Copy the package and make a page's edits in it."""
    left_out = shutil.ignore_patterns("nano", "web", "__pycache__")
    shutil.copytree(REPOSITORY / "src", folder / "src", ignore=left_out)
    edits = EDIT.findall(page)
    assert len(edits) == page.count("<!-- goes "), "an edit is not in the form that is read here"
    for place, line, file, code in edits:
        text = (folder / file).read_text("utf-8")
        assert text.count(f"\n{line}\n") == 1, f"{file} has not one line {line!r}"
        both = f"{line}\n{code.rstrip()}" if place == "below" else f"{code.rstrip()}\n{line}"
        (folder / file).write_text(text.replace(f"\n{line}\n", f"\n{both}\n"), encoding="utf-8")
    return folder / "src"


def run(page_name: str, more: str, folder: Path) -> str:
    """Run a page's example, then more code, with the edited package; return what was printed."""
    page = (REPOSITORY / "docs" / page_name).read_text("utf-8")
    (example,) = EXAMPLE.findall(page)
    environment = {**os.environ, "PYTHONPATH": str(edited_package(page, folder))}
    done = subprocess.run(
        [sys.executable, "-c", example + more],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def save(folder: Path, peer: nn.Module, config: dict, names: dict[str, str]) -> None:
    """Write a peer's tensors under other names, and a config.json."""
    folder.mkdir()
    tensors = {}
    for name, tensor in peer.state_dict().items():
        for old, new in names.items():
            name = re.sub(old, new, name)
        tensors[name] = tensor.clone()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@torch.no_grad()
def test_a_language_model_is_two_entries(tmp_path: Path) -> None:
    peer = Qwen2ForCausalLM(Qwen2Config(**TEXT, rms_norm_eps=1e-5, tie_word_embeddings=True))
    randomized(peer)
    config = {key: value for key, value in TEXT.items() if key != "vocab_size"}
    names = {r"^model\.": "transformer.", r"o_proj": "dense", r"down_proj": "fc2"}
    save(tmp_path / "pebble-tiny", peer, config | {"model_type": "pebble"}, names)
    fast_tokenizer().save_pretrained(tmp_path / "pebble-tiny")
    more = "import numpy\nnumpy.save('logits.npy', trace.logits)\n"
    assert "(5, 264)" in run("add-a-language-model.md", more, tmp_path)
    theirs = peer(torch.tensor([[1, 5, 9, 200, 17]])).logits[0]
    assert_close(torch.from_numpy(np.load(tmp_path / "logits.npy")), theirs, "pebble")


@torch.no_grad()
def test_a_vision_tower_is_defaults_flags_and_names(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    settings = SiglipVisionConfig(**sizes, image_size=28, patch_size=7, vision_use_head=False)
    peer = SiglipVisionModel(settings)
    randomized(peer)
    names = {
        r"^(vision_model\.)?": "vision_model.",
        r"vision_model\.encoder\.layers\.": "trunk.",
    }
    save(tmp_path / "eye-tiny", peer, sizes | {"model_type": "eye_vision_model"}, names)
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    torch.save(pixels, tmp_path / "pixels.pt")
    more = "torch.save(tower(torch.load('pixels.pt'), -2).detach(), 'features.pt')\n"
    assert "[1, 16, 32]" in run("add-a-vision-tower.md", more, tmp_path)
    theirs = peer(pixels, output_hidden_states=True).hidden_states[-2]
    assert_close(torch.load(tmp_path / "features.pt"), theirs, "eye")
