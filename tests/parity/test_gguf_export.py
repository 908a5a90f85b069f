"""Language models written as GGUF: read again by us, and by llama.cpp, they say the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.llamacpp import llama_cpp
from tests.parity.decoders import random_ids
from tests.parity.peers import assert_close
from tests.parity.test_gguf_families import VARIANTS, build_peer, write
from visavis.checkpoints.checkpoint import Checkpoint
from visavis.checkpoints.gguf.export import write_gguf
from visavis.checkpoints.gguf.quantize import FILE_TYPES
from visavis.checkpoints.gguf.reader import open_gguf
from visavis.checkpoints.load import load_checkpoint
from visavis.model.config import RopeScaling
from visavis.model.vlm import VLM
from visavis.processing.chat_template import Encoded
from visavis.processing.collate import pack

pytestmark = pytest.mark.parity

IDS = random_ids(40).tolist()
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)


@torch.no_grad()
def logits(loaded: Checkpoint) -> Tensor:
    batch = pack([Encoded(IDS, [], [False] * len(IDS))])
    return loaded.vlm.decoder.logits(loaded.vlm(batch)[-1])


def load_variant(folder: Path, name: str) -> Checkpoint:
    """Return a tiny model that the `gguf` library wrote; widths are whole blocks of 32."""
    path = write(folder / "peer.gguf", name, build_peer(name, intermediate_size=64))
    return load_checkpoint(path, precision="f32", device="cpu")


def distance(loaded: Checkpoint, path: Path) -> float:
    """Return how far log-probabilities of the likeliest next tokens are from llama.cpp's."""
    ours = logits(loaded)[-1].log_softmax(-1)
    with llama_cpp(path, context_length=256) as server:
        found = server.next_token(IDS)
    return max(abs(ours[token].item() - value) for token, value in found.items())


@pytest.mark.parametrize("name", VARIANTS)
def test_what_was_written_is_read_again(name: str, tmp_path: Path) -> None:
    loaded = load_variant(tmp_path, name)
    [path] = write_gguf(loaded, tmp_path / "ours.gguf", kind="F32")
    again = load_checkpoint(path, precision="f32", device="cpu")
    assert again.vlm.config == loaded.vlm.config
    assert_close(logits(again), logits(loaded), name)
    assert again.tokenizer.to_str() == loaded.tokenizer.to_str()
    assert again.specials == loaded.specials and again.profile == loaded.profile
    expected = name.split(",")[0] if name != "phi3" else "llama"  # plain, it is one
    assert open_gguf(path).metadata["general.architecture"] == expected
    if "window" not in name:  # llama.cpp leaves Phi-3's out
        worst = distance(again, path)
        print(f"{name}: log probabilities differ by {worst:.1e} from llama.cpp's")
        assert worst < 0.02


@pytest.mark.parametrize("kind", [kind for kind in FILE_TYPES if kind != "F32"])
def test_llama_cpp_reads_every_type(kind: str, tmp_path: Path) -> None:
    """llama.cpp rounds what it multiplies with quantised weights to 8 bits; we do not."""
    loaded = load_variant(tmp_path, "llama")
    [path] = write_gguf(loaded, tmp_path, kind=kind)
    assert path == tmp_path / "model.gguf"
    again = load_checkpoint(path, precision="f32", device="cpu")
    worst = distance(again, path)
    print(f"{kind}: log probabilities differ by {worst:.1e} from llama.cpp's")
    assert worst < 0.1


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q6_K"])
def test_blocks_of_256_are_read_alike(kind: str, tmp_path: Path) -> None:
    """Rows wide enough for the K types: embeddings, and q, k, v and the second matrix mixed."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 3}
    path = write(tmp_path / "peer.gguf", "llama", build_peer("llama", **sizes))
    loaded = load_checkpoint(path, precision="f32", device="cpu")
    [path] = write_gguf(loaded, tmp_path / "k.gguf", kind=kind)
    types = {name: info.type for name, info in open_gguf(path).tensors.items()}
    assert types["token_embd.weight"] == ("Q4_K" if kind == "Q4_K_M" else "Q6_K")
    assert types["output.weight"] == types["blk.2.attn_v.weight"] == "Q6_K"
    assert distance(load_checkpoint(path, precision="f32", device="cpu"), path) < 0.1


def test_gemmas_offset_is_added_as_converters_add_it(tmp_path: Path) -> None:
    loaded = load_variant(tmp_path, "gemma")
    config = replace(loaded.vlm.config.decoder, norm_offset=1.0)
    vlm = VLM(replace(loaded.vlm.config, decoder=config)).eval().requires_grad_(False)
    state = loaded.vlm.state_dict()
    vlm.load_state_dict({k: v - 1 if "norm" in k else v for k, v in state.items()})
    [path] = write_gguf(replace(loaded, vlm=vlm), tmp_path, kind="F32")
    assert_close(logits(load_checkpoint(path, precision="f32")), logits(loaded), "with an offset")


@pytest.mark.parametrize("scaling", [LLAMA3, RopeScaling("linear", 2.0)], ids=["llama3", "linear"])
def test_stretched_rotary_positions(scaling: RopeScaling, tmp_path: Path) -> None:
    loaded = load_variant(tmp_path, "llama")
    config = replace(loaded.vlm.config.decoder, rope_scaling=scaling)
    vlm = VLM(replace(loaded.vlm.config, decoder=config)).eval().requires_grad_(False)
    vlm.load_state_dict(loaded.vlm.state_dict())
    assert (logits(replace(loaded, vlm=vlm)) - logits(loaded)).abs().max() > 0.1
    [path] = write_gguf(replace(loaded, vlm=vlm), tmp_path, kind="F32")
    again = load_checkpoint(path, precision="f32", device="cpu")
    assert_close(logits(again), logits(replace(loaded, vlm=vlm)), scaling.kind)
    assert distance(again, path) < 0.02


def test_openelm_of_other_widths_per_layer(tmp_path: Path) -> None:
    loaded = load_variant(tmp_path, "llama")
    config = replace(
        loaded.vlm.config.decoder,
        num_heads=(2, 4, 4),
        num_kv_heads=(1, 2, 2),
        ffn_width=(32, 64, 96),
        qk_norm=True,
        tied_head=True,
    )
    torch.manual_seed(0)
    vlm = VLM(replace(loaded.vlm.config, decoder=config)).eval().requires_grad_(False)
    loaded = replace(loaded, vlm=vlm)
    [path] = write_gguf(loaded, tmp_path, kind="F32")
    assert open_gguf(path).metadata["general.architecture"] == "openelm"
    again = load_checkpoint(path, precision="f32", device="cpu")
    assert again.vlm.config == loaded.vlm.config
    assert_close(logits(again), logits(loaded), "openelm")
    worst = distance(again, path)
    print(f"openelm: log probabilities differ by {worst:.1e} from llama.cpp's")
    assert worst < 0.02
