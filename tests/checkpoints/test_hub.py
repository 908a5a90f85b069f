"""Names on the hub: what is downloaded, from a server on this machine; the cache without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints.hub_server import hub_server
from tests.checkpoints.llava_files import save_original, save_tower, tiny_peer
from tests.checkpoints.transformers_files import save_qwen2
from visavis import load
from visavis.checkpoints.hub import HubId, parse, wanted_files
from visavis.errors import CheckpointError, FetchError

# A process of its own: the hub's library reads its settings from the environment once.
FETCH = """
import json, sys
from visavis.checkpoints.load import resolve
from visavis.errors import VisavisError
answers = []
for name in sys.argv[1:]:
    try:
        path = resolve(name)
        inside = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
        answers.append([path.name, inside])
    except VisavisError as error:
        answers.append(f"{type(error).__name__}: {error}")
print(json.dumps(answers))
"""


def fetch(cache: Path, endpoint: str, *names: str, **environment: str) -> list[list[str] | str]:
    cache.mkdir(exist_ok=True)
    settings = {"HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
    result = subprocess.run(
        [sys.executable, "-c", FETCH, *names],
        env={**os.environ, **settings, "HF_HUB_ETAG_TIMEOUT": "2", **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == "", "nobody looks at a terminal, so there is no progress bar"
    answers: list[list[str] | str] = json.loads(result.stdout)
    return answers


def write(root: Path, repository: str, *names: str) -> None:
    for name in names:
        path = root / repository / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}")


SHARDS = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
LLAMA = ["config.json", "tokenizer.json", "tokenizer_config.json"]
SHARDED = [*LLAMA, *SHARDS, "model.safetensors.index.json"]


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    unwanted = ["modeling_llava.py", "README.md", "pytorch_model-00001-of-00001.bin"]
    unwanted += ["pytorch_model.bin.index.json", "tokenizer.model", "consolidated.safetensors"]
    unwanted += ["onnx/model.onnx", "original/model.safetensors"]
    write(root, "someone/sharded", *SHARDED, *unwanted)
    write(root, "someone/files", "a-Q4_0.gguf", "b-00001-of-00002.gguf", "b-00002-of-00002.gguf")
    write(root, "meta/gated", "config.json", "model.safetensors")
    write(root, "someone/data", "train.parquet")
    return root


def test_what_is_downloaded_and_what_is_refused(repositories: Path, tmp_path: Path) -> None:
    with hub_server(repositories, gated=("meta/gated",)) as hub:
        answers = fetch(
            tmp_path,
            hub.url,
            *(
                "someone/sharded",
                "someone/files:a-Q4_0.gguf",
                "someone/files:b-00002-of-00002.gguf",
            ),
            *("someone/files", "someone/files:c.gguf", "someone/data", "meta/gated"),
            *("someone/missing", "someone/sharded@v2", "plain"),
        )
        downloaded = sorted(hub.sent)
    sharded, whole, part, no_file, other_file, data, gated, missing, revision, plain = answers
    assert isinstance(sharded, list) and sharded[1] == sorted(SHARDED)
    assert whole[0] == "a-Q4_0.gguf" and part[0] == "b-00002-of-00002.gguf"
    parts = ["a-Q4_0.gguf", "b-00001-of-00002.gguf", "b-00002-of-00002.gguf"]
    assert downloaded == sorted([*SHARDED, *parts]), "nothing else, code least of all"
    assert "name one of its files: someone/files:FILE (a-Q4_0.gguf, b-00001" in no_file
    assert "has no c.gguf, expected one of a-Q4_0.gguf, b-" in other_file
    assert "may be a data set" in data
    assert "gated" in gated and "accept terms" in gated and "HF_TOKEN" in gated
    assert "no file or folder here, and the hub has no 'someone/missing'" in missing
    assert "no revision 'v2'" in revision
    assert "UnknownNameError" in plain and "owner/name" in plain


def test_without_a_network_the_cache_is_used(repositories: Path, tmp_path: Path) -> None:
    names = ("someone/sharded", "someone/sharded@main", "someone/files:a-Q4_0.gguf")
    with hub_server(repositories) as hub:
        online = fetch(tmp_path, hub.url, *names)
    offline = fetch(tmp_path, hub.url, *names, "someone/files", HF_HUB_OFFLINE="1")
    assert offline[:3] == online and "HF_HUB_OFFLINE is set" in offline[3]
    unreachable = fetch(tmp_path, hub.url, *names, "someone/files")  # the server has ended
    assert unreachable[:3] == online and "the hub cannot be reached" in unreachable[3]
    assert "not in the cache" in unreachable[3]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", HubId("owner/name")),
        ("owner/na.me-1@refs/pr/3", HubId("owner/na.me-1", "refs/pr/3")),
        ("o/n:sub/x.gguf", HubId("o/n", "main", "sub/x.gguf")),
        ("o/n@v1:x.gguf", HubId("o/n", "v1", "x.gguf")),
        ("name", None),
        ("a/b/c", None),
        ("../name", None),
        ("o/n:../x.gguf", None),
        ("o/n:x.bin", None),
        ("/etc/passwd", None),
        ("./folder", None),
        ("öwner/name", None),
    ],
)
def test_what_is_a_name_on_the_hub(text: str, expected: HubId | None) -> None:
    assert parse(text) == expected
    assert expected is None or str(expected) == text


@pytest.mark.parametrize(
    ("listed", "wanted"),
    [
        (["config.json", "pytorch_model.bin", "mm_projector.bin"], [0, 1]),
        (["config.json", "mm_projector.bin", "trainer_state.json"], [0, 1]),
        (["visavis.json", "adapter.safetensors", "tokenizer.json"], [0, 1, 2]),
        (["adapter_config.json", "adapter_model.bin", "non_lora_trainables.bin"], [0, 1, 2]),
        (
            [
                *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
                *("optimizer.pt", "checkpoint-10/adapter_model.safetensors"),
            ],
            [0, 1],
        ),
        (["config.json", "vocab.json", "merges.txt", "pytorch_model.bin"], [0, 1, 2, 3]),
        (
            [
                *("config.json", "language_model/config.json", "language_model/pytorch_model.bin"),
                *("connector/pytorch_model.bin", "vision_tower/x.py", "other/pytorch_model.bin"),
            ],
            [0, 1, 2, 3],
        ),
    ],
)
def test_one_format_of_weights(listed: list[str], wanted: list[int]) -> None:
    found = wanted_files(listed, HubId("o/n"))
    assert sorted(found) == sorted(listed[n] for n in wanted)


def test_names_with_patterns_in_them_are_no_patterns() -> None:
    with pytest.raises(FetchError, match="none of visavis"):
        wanted_files(["*", "c?nfig.json"], HubId("o/n"))


LOAD = """
import json, sys, visavis
from visavis.errors import CheckpointError
for path in sys.argv[1:]:
    try:
        print(len(visavis.load(path, precision="f32", device="cpu").embed(["text"])[0]))
    except CheckpointError as error:
        print(error)
"""


def test_the_parts_that_a_checkpoint_names(tmp_path: Path) -> None:
    """The vision tower of an original LLaVA, and the base of an adapter."""
    peer = tiny_peer()
    save_tower(tmp_path / "hub" / "someone" / "tower", peer)
    llava, adapter = tmp_path / "llava", tmp_path / "adapter"
    save_original(llava, peer, with_tower=False, mm_vision_tower="someone/tower")
    save_qwen2(tmp_path / "hub" / "someone" / "base")
    save_lora(adapter, base="someone/base")
    settings = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    with hub_server(tmp_path / "hub") as hub:
        settings["HF_ENDPOINT"] = hub.url
        command = [sys.executable, "-c", LOAD, str(llava), str(adapter)]
        online = subprocess.run(
            command, env=os.environ | settings, capture_output=True, text=True, check=True
        )
    assert online.stdout == "32\n32\n", online.stderr
    save_lora(adapter, base="someone/other")
    with pytest.raises(CheckpointError, match=r"someone/other.* HF_HUB_OFFLINE is set"):
        load(adapter)
    with pytest.raises(CheckpointError, match=r"vision_tower='…'.* HF_HUB_OFFLINE is set"):
        load(llava)


def save_lora(folder: Path, base: str) -> None:
    folder.mkdir(exist_ok=True)
    pair = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{name}.weight": torch.ones(*shape)
        for name, shape in (("A", (4, 32)), ("B", (32, 4)))
    }
    save_file(pair, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
