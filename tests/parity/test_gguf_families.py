"""Every GGUF text architecture: a tiny transformers model, written with the `gguf` library's own
names, read by us; against transformers, and against llama.cpp where its wheel is installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.llamacpp import llama_cpp
from tests.parity.decoders import BASE, random_ids
from tests.parity.peers import assert_close, randomized
from tests.parity.test_decoder_families import CLASSES, LONGROPE, SPECIALS
from visavis.checkpoints.gguf.decoder import decoder_config
from visavis.checkpoints.gguf.reader import open_gguf
from visavis.checkpoints.load import load_checkpoint
from visavis.checkpoints.transformers.vision_models import vlm_config
from visavis.errors import CheckpointError
from visavis.model.quantized_linear import QuantizedLinear, packed_kernels
from visavis.processing.chat_template import Encoded
from visavis.processing.collate import pack

pytestmark = pytest.mark.parity

# No token is half a character: llama.cpp waits for the other half and gives no probabilities.
LETTERS = [chr(code) for code in range(33, 127)] + ["Ċ", "Ġ"]
VOCABULARY = [*LETTERS, *(f"word{number}" for number in range(90)), "ab", "<|endoftext|>"]
LAYER_NORM = {"phi2", "stablelm"}
PEERS = CLASSES | {"llama": (LlamaConfig, LlamaForCausalLM)}
VARIANTS: dict[str, dict[str, Any]] = {  # a name starts with the architecture
    "llama": {},
    "llama, wide heads, tied": {"head_dim": 16, "tie_word_embeddings": True},
    "qwen2": {},
    "qwen2, tied": {"tie_word_embeddings": True},
    "phi2": {},
    "phi2, fused": {},
    "phi3": {},
    "phi3, window of 8": {"sliding_window": 8},
    "phi3, longrope": {  # llama.cpp turns to the long factors when it is given more than 256
        "rope_parameters": LONGROPE,
        "original_max_position_embeddings": 256,
        "max_position_embeddings": 512,
    },
    "gemma": {"head_dim": 12},
    "stablelm": {},
    "stablelm, biases": {"use_qkv_bias": True},
    "stablelm, parallel": {"use_parallel_residual": True},
}


def build_peer(name: str, **changes: Any) -> PreTrainedModel:
    kind = name.split(",")[0].replace("phi2", "phi")
    config, model = PEERS[kind]
    settings = BASE | SPECIALS | VARIANTS[name] | {"vocab_size": len(VOCABULARY)} | changes
    peer = model(config(**settings))
    randomized(peer)
    return peer


def write(
    path: Path,
    name: str,
    peer: PreTrainedModel,
    extra: dict[str, np.ndarray] | None = None,
    quantised: bool = False,
    tensors_per_file: int = 0,
) -> Path:
    """Write a peer as llama.cpp's converter does, perhaps with tensors of another variant."""
    kind, config = name.split(",")[0], peer.config
    ours = vlm_config(config.to_dict()).decoder
    writer = gguf.GGUFWriter(path, kind, split_max_tensors=tensors_per_file)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(ours.head_dim)
    writer.add_value_length(ours.head_dim)
    writer.add_rope_dimension_count(ours.rotary_dim)
    writer.add_rope_freq_base(ours.rope_base)
    epsilon = writer.add_layer_norm_eps if kind in LAYER_NORM else writer.add_layer_norm_rms_eps
    epsilon(ours.norm_eps)
    if kind == "stablelm":
        writer.add_parallel_residual(config.use_parallel_residual)
    if getattr(config, "sliding_window", None) and kind == "phi3":
        writer.add_sliding_window(config.sliding_window)
    if ours.rope_scaling is not None:
        writer.add_rope_scaling_attn_factors(ours.rope_scaling.magnitude)
        writer.add_rope_scaling_orig_ctx_len(ours.rope_scaling.original_context)
        for which in ("long", "short"):
            factors = np.array(LONGROPE[f"{which}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{which}.weight", factors)
    add_tokenizer(writer)
    for tensor_name, array in [*tensors(name, peer), *(extra or {}).items()]:
        if quantised and array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(tensor_name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor_name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([1] * (len(VOCABULARY) - 1) + [3])
    writer.add_token_merges(["a b"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id):
        add(len(VOCABULARY) - 1)
    writer.add_add_bos_token(False)


def tensors(name: str, peer: PreTrainedModel) -> Iterator[tuple[str, np.ndarray]]:
    """Yield a peer's tensors by the names that the `gguf` library maps them to."""
    kind = name.split(",")[0]
    architecture = {text: arch for arch, text in gguf.MODEL_ARCH_NAMES.items()}[kind]
    names = gguf.get_tensor_name_map(architecture, peer.config.num_hidden_layers)
    state = dict(peer.state_dict())
    if peer.config.tie_word_embeddings:
        del state["lm_head.weight"]
    if name == "phi2, fused":
        fuse(state)
    for theirs, tensor in state.items():
        found = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        assert found is not None, theirs
        array = tensor.float().numpy()
        if kind == "gemma" and "norm" in theirs:
            array = array + 1
        if kind == "llama" and ("q_proj" in theirs or "k_proj" in theirs):
            array = interleave(array, vlm_config(peer.config.to_dict()).decoder.head_dim)
        yield found, array


def fuse(state: dict[str, torch.Tensor]) -> None:
    """Join q, k and v as the first generation of Phi-2's files has them."""
    for name in [n for n in state if "q_proj" in n]:
        parts = [state.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        state[name.replace("q_proj", "query_key_value")] = torch.cat(parts)


def interleave(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Move rotary pairs side by side, as llama.cpp's converter does for llama."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_logits_are_the_peers(name: str, tmp_path: Path) -> None:
    peer = build_peer(name)
    path = write(tmp_path / "tiny.gguf", name, peer)
    loaded = load_checkpoint(path, precision="f32", device="cpu")
    lengths = [60, 1, 17]
    sequences = [random_ids(length, seed=length) for length in lengths]
    batch = pack([Encoded(ids.tolist(), [], [False] * len(ids)) for ids in sequences])
    logits = loaded.vlm.decoder.logits(loaded.vlm(batch)[-1]).split(lengths)
    for ours, ids in zip(logits, sequences, strict=True):
        assert_close(ours, peer(ids[None]).logits[0], f"{name}: {len(ids)} tokens")


@pytest.mark.parametrize("name", VARIANTS)
def test_configs_are_those_of_config_json(name: str, tmp_path: Path) -> None:
    peer = build_peer(name)
    found = decoder_config(open_gguf(write(tmp_path / "tiny.gguf", name, peer)))
    expected = vlm_config(peer.config.to_dict()).decoder
    for field in ("head_dim", "rotary_dim", "context_length", "qkv_bias", "out_bias", "ffn_bias"):
        assert getattr(found, field) == getattr(expected, field), field
    for field in ("head_bias", "parallel_block", "tied_head", "sliding_window", "activation"):
        assert getattr(found, field) == getattr(expected, field), field


@pytest.mark.parametrize("name", [n for n in VARIANTS if "window" not in n])
@torch.no_grad()
def test_llama_cpp_says_the_same(name: str, tmp_path: Path) -> None:
    """llama.cpp leaves Phi-3's window out, so that variant is only compared with transformers."""
    peer = build_peer(name)
    path = write(tmp_path / "tiny.gguf", name, peer)
    loaded = load_checkpoint(path, precision="f32", device="cpu")
    ids = random_ids(40).tolist()
    batch = pack([Encoded(ids, [], [False] * len(ids))])
    ours = loaded.vlm.decoder.logits(loaded.vlm(batch)[-1][-1:])[0].log_softmax(-1)
    with llama_cpp(path, context_length=256) as server:
        request = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": 20}
        found = server.post("/completion", request)["completion_probabilities"][0]["top_logprobs"]
    assert len(found) == 20
    worst = max(abs(ours[token["id"]].item() - token["logprob"]) for token in found)
    print(f"{name}: log probabilities differ by {worst:.1e} from llama.cpp's")
    assert worst < 0.05  # its caches and matrix products are rounded to half precision


@torch.no_grad()
def test_a_split_model_is_one_model(tmp_path: Path) -> None:
    peer = build_peer("qwen2")
    write(tmp_path / "tiny.gguf", "qwen2", peer, tensors_per_file=10)
    parts = sorted(tmp_path.glob("tiny-*.gguf"))
    assert len(parts) == 4
    loaded = load_checkpoint(parts[0], precision="f32", device="cpu")
    assert loaded.files == parts
    ids = random_ids(20)
    batch = pack([Encoded(ids.tolist(), [], [False] * len(ids))])
    logits = loaded.vlm.decoder.logits(loaded.vlm(batch)[-1])
    assert_close(logits, peer(ids[None]).logits[0], "a model in four files")


@pytest.mark.parametrize("name", ["qwen2, tied", "phi2, fused", "phi3", "gemma", "stablelm"])
@torch.no_grad()
def test_quantised_blocks_are_packed(name: str, tmp_path: Path) -> None:
    """8-bit files decode from their integers, and give what their values give: biases too, and 188
    tokens, which are no whole number of the kernel's blocks."""
    sizes = {"intermediate_size": 64} | ({"head_dim": 16} if name == "gemma" else {})
    peer = build_peer(name, **sizes)
    path = write(tmp_path / "tiny.gguf", name, peer, quantised=True)
    exact = load_checkpoint(path, precision="f32", device="cpu").vlm
    packed = load_checkpoint(path, device="cpu").vlm
    assert not any(isinstance(module, torch.nn.Linear) for module in packed.decoder.modules())
    assert isinstance(packed.decoder.head, QuantizedLinear)
    ids = random_ids(20).tolist()
    batch = pack([Encoded(ids, [], [False] * len(ids))])
    with packed_kernels():
        ours = packed.decoder.logits(packed(batch)[-1])
    theirs = exact.decoder.logits(exact(batch)[-1])
    cosines = torch.cosine_similarity(ours, theirs)  # bfloat16 moves sharp attention a little
    assert cosines.median() > 0.999 and cosines.min() > 0.95


@pytest.mark.parametrize(
    ("name", "extra", "named"),
    [
        ("stablelm", "blk.0.attn_q_norm.weight", "unexpected blk.0.attn_q_norm.weight"),
        ("qwen2", "blk.1.attn_output.bias", "unexpected blk.1.attn_output.bias"),
        ("phi2", "blk.2.ffn_norm.weight", "unexpected blk.2.ffn_norm.weight"),
        ("llama", "rope_factors_long.weight", "rope_factors_long.weight without"),
    ],
)
def test_tensors_of_other_variants_are_named(
    name: str, extra: str, named: str, tmp_path: Path
) -> None:
    peer = build_peer(name)
    path = write(tmp_path / "tiny.gguf", name, peer, {extra: np.ones(32, np.float32)})
    with pytest.raises(CheckpointError, match=named):
        load_checkpoint(path, precision="f32", device="cpu")


def test_heads_of_llama_rotate_whole(tmp_path: Path) -> None:
    """Its rotary pairs lie side by side, which our rows undo for whole heads only."""
    peer = build_peer("llama")
    path = write(tmp_path / "tiny.gguf", "llama", peer)
    key = b"llama.rope.dimension_count" + (4).to_bytes(4, "little")
    content = path.read_bytes()
    assert content.count(key + (8).to_bytes(4, "little")) == 1
    path.write_bytes(content.replace(key + b"\x08", key + b"\x04"))
    with pytest.raises(CheckpointError, match="4 of 8 channels of a head rotate, expected all"):
        decoder_config(open_gguf(path))
