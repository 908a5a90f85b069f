"""Weights that stay integers: GGUF's types, any checkpoint in int8 and int4, our own folders.

As PyTorch's kernels take them; what the compiled kernels take is in test_native_packing.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import visavis
from tests.checkpoints.transformers_files import save_qwen2
from tests.fakes import picture, write_tiny_checkpoint
from tests.gguf_files import llama_metadata, random_state, tiny_config, write_gguf
from visavis.checkpoints import quantize
from visavis.checkpoints.gguf.decoder import StoredPart, gguf_state
from visavis.checkpoints.gguf.dequantize import BY_NAME, dequantize
from visavis.checkpoints.gguf.reader import open_gguf
from visavis.checkpoints.gguf.repack import CODES, groups_of, packed_as
from visavis.checkpoints.load import load_checkpoint
from visavis.checkpoints.native import write_native
from visavis.checkpoints.quantize import Quantizer, unpack_linears
from visavis.convert.conversion import convert
from visavis.errors import CheckpointError, CheckpointWarning, InputError
from visavis.model.config import VLMConfig
from visavis.model.quantized_linear import (
    REGROUPED,
    QuantizedEmbedding,
    QuantizedLinear,
    packed_kernels,
)
from visavis.processing.chat_template import Encoded
from visavis.processing.collate import pack

ADDED = {"Q2_K": 0.06, "Q3_K": 0.002, "Q6_K": 0.15}  # to the squared error of the type itself
LETTERS = [*(chr(code) for code in range(33, 127)), "ab", "Ġ"]


pytestmark = pytest.mark.usefixtures("without_kernels")


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tiny models count as large: nothing floating-point beside the integers."""
    monkeypatch.setattr(quantize, "MAX_DENSE_WEIGHTS", 0)


def random_blocks(type: str, rows: int, inside: int) -> StoredPart:
    """Return random codes with scales as a real file has them."""
    kind = BY_NAME[type]
    generator = np.random.default_rng(1)
    raw = generator.integers(0, 256, (rows * inside // kind.block, kind.nbytes), np.uint8)
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2)}
    for at in halves.get(type, (0, 2) if type.endswith("_1") else (0,)):
        scales = generator.uniform(0.5, 1, len(raw)).astype("<f2") * 2.0**-10
        raw[:, at : at + 2] = scales.astype("<f2")[:, None].view(np.uint8)
    return StoredPart(raw.reshape(rows, -1), type, (rows, inside))


def values_of(part: StoredPart) -> torch.Tensor:
    return torch.from_numpy(dequantize(part.raw.reshape(-1), part.type, part.shape))


@pytest.mark.parametrize("type", [*CODES, *REGROUPED])
def test_blocks_keep_their_values(type: str) -> None:
    """Types of groups of 32 keep their codes: only scales are rounded, to bfloat16."""
    part = random_blocks(type, 16, 512)
    found, form = values_of(part), packed_as(type)
    assert form is not None
    groups = groups_of(part, *form)
    assert (groups.bits, groups.group) == form
    grouped = found.unflatten(1, (-1, groups.group))
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    away = (groups.values() - found).abs().unflatten(1, (-1, groups.group))
    rounded = 2.0**-8 * (grouped.abs() + (high - low) + (high + low).abs() / 2)
    if type in REGROUPED:
        rounded += 0.51 * (high - low) / (2**groups.bits - 1)
    assert (away <= rounded).all()


@pytest.mark.parametrize("type", REGROUPED)
def test_what_new_grids_add_is_little(type: str) -> None:
    """Beside the error that the type makes itself: numbers spread evenly over each of its steps."""
    part = random_blocks(type, 64, 1024)
    found, form = values_of(part), packed_as(type)
    assert form is not None
    step = torch.from_numpy(np.abs(part.parts().scale)).repeat_interleave(16, 1)
    added = (groups_of(part, *form).values() - found).square().mean()
    assert added < ADDED[type] * step.square().mean() / 12


def test_a_type_that_is_not_quantised_is_not_packed() -> None:
    assert {type for type in BY_NAME if packed_as(type)} == {*CODES, *REGROUPED}


# ---- GGUF files ----------------------------------------------------------------------------------


SIZES = {"vocab_size": 96, "width": 64, "head_dim": 16, "ffn_width": 96}


def write_model(path: Path, type: str, of_values: str = "", **changes: Any) -> Path:
    """Write a llama model whose matrices are of a type, with a vocabulary of letters.

    Args:
        of_values: another type, of the matrices that make values.
    """
    config = tiny_config(**SIZES | changes)
    state = {k: v * (1 if v.ndim == 1 else 0.2) for k, v in random_state(config).items()}
    tensors, types = {}, {}
    for name, array in gguf_state(state, config):
        if array.ndim == 2 and type != "F32":
            types[name] = of_values if of_values and "attn_v" in name else type
            array = gguf.quants.quantize(array, gguf.GGMLQuantizationType[types[name]])
        tensors[name] = array
    vocabulary = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": LETTERS,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 0,
    }
    return write_gguf(path, llama_metadata(config) | vocabulary, tensors, types)


def packed_of(model: visavis.Model) -> dict[str, list[tuple[int, int]]]:
    """Return bits and group of every packed part by its module's name."""
    return {
        name: [(part.bits, part.group) for part in module.parts]
        for name, module in model.vlm.decoder.named_modules()
        if isinstance(module, QuantizedLinear)
    }


def logits(model: visavis.Model, decoding: bool = False) -> torch.Tensor:
    batch = pack([Encoded(list(range(20)), [], [False] * 20)])
    vlm = model.vlm
    with torch.inference_mode():
        if not decoding:
            return vlm.decoder.logits(vlm(batch)[-1])
        with packed_kernels():
            return vlm.decoder.logits(vlm(batch)[-1])


def assert_near(found: torch.Tensor, expected: torch.Tensor, least: float = 0.997) -> None:
    assert torch.cosine_similarity(found.float(), expected.float()).min() > least


@pytest.mark.parametrize("type", ["Q8_0", "Q4_0", "Q5_1", "F32"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.usefixtures("large")
def test_large_files_keep_nothing_else(type: str, tied: bool, tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", type, tied_head=tied)
    model, exact = visavis.load(path, device="cpu"), visavis.load(path, precision="f32")
    found = packed_of(model)
    if type == "F32":
        assert found == {}
    else:
        bits = 4 if type == "Q4_0" else 8
        assert {tuple(parts) for parts in found.values()} == {((bits, 32),)}
        assert len(found) == 4 * 2 + 2  # the head, and the embeddings
        packed = [m for m in model.vlm.decoder.modules() if isinstance(m, QuantizedLinear)]
        assert all(linear.dense is None for linear in packed)
        assert isinstance(model.vlm.decoder.embed, QuantizedEmbedding)
    for decoding in (False, True):
        assert_near(logits(model, decoding), logits(exact))
    assert packed_of(exact) == {}


def test_small_files_keep_a_copy(tmp_path: Path) -> None:
    """Prompts are read from it, bitwise as by the same weights in bfloat16."""
    path = write_model(tmp_path / "model.gguf", "Q8_0")
    model, dense = visavis.load(path, device="cpu"), visavis.load(path, precision="bf16")
    assert len(packed_of(model)) == 4 * 2 + 1
    assert packed_of(dense) == {}
    if model.vlm.decoder.dtype == torch.bfloat16:
        assert torch.equal(logits(model), logits(dense))
    assert_near(logits(model, decoding=True), logits(dense))


@pytest.mark.parametrize("precision", ["auto", "int8", "int4"])
@pytest.mark.usefixtures("large")
def test_company_changes_no_answer(precision: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", "Q8_0")
    model = visavis.load(path, precision=precision, device="cpu")
    items = ["abc", "a longer text than that, to be read", "x", "defghi" * 5]
    together = model.embed(items)
    alone = np.concatenate([model.embed([item]) for item in items])
    assert np.abs(alone - together).max() < 1e-5


@pytest.mark.usefixtures("large")
def test_int4_of_a_file_of_8_bits(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", "Q8_0", tied_head=False)
    found = packed_of(visavis.load(path, precision="int4", device="cpu"))
    assert {name for name, parts in found.items() if parts == [(8, 32)]} == {"embed", "head"}
    assert all(parts == [(4, 32)] for name, parts in found.items() if name not in ("embed", "head"))


@pytest.mark.usefixtures("large")
def test_parts_of_a_fused_matrix_keep_their_types(tmp_path: Path) -> None:
    """Q4_K_M has more bits for values than for queries and keys."""
    path = write_model(tmp_path / "model.gguf", "Q4_0", of_values="Q8_0")
    model = visavis.load(path, device="cpu")
    assert packed_of(model)["blocks.0.qkv"] == [(4, 32), (8, 32)]
    for decoding in (False, True):
        assert_near(logits(model, decoding), logits(visavis.load(path, precision="f32")))


@pytest.mark.usefixtures("large")
def test_scales_that_are_not_finite_are_warned_of(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", "Q8_0")
    info = open_gguf(path).tensors["blk.1.ffn_down.weight"]
    content = bytearray(path.read_bytes())
    content[info.offset : info.offset + 2] = np.array(np.inf, "<f2").tobytes()
    path.write_bytes(content)
    with pytest.warns(CheckpointWarning, match="blocks.1.down.weight of .* holds NaN or infinite"):
        visavis.load(path, device="cpu")


@pytest.mark.usefixtures("large")
def test_processors_without_bfloat16_pack_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visavis.checkpoints.checkpoint.has_bf16_instructions", lambda: False)
    path = write_model(tmp_path / "model.gguf", "Q8_0")
    model = visavis.load(path, device="cpu")
    assert model.vlm.decoder.dtype == torch.float32 and packed_of(model)
    exact = logits(visavis.load(path, precision="f32"))
    assert (logits(model) - exact).abs().max() < 0.02 * exact.abs().max()
    assert_near(logits(model, decoding=True), exact)


# ---- any checkpoint ------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("threshold", [0, 1 << 28])
def test_folders_are_quantised_while_they_are_read(
    precision: str, tied: bool, threshold: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "MAX_DENSE_WEIGHTS", threshold)
    save_qwen2(tmp_path / "model", tie_word_embeddings=tied, intermediate_size=64)
    model = visavis.load(tmp_path / "model", precision=precision, device="cpu")
    exact = visavis.load(tmp_path / "model", precision="f32")
    bits = 4 if precision == "int4" else 8
    found = packed_of(model)
    assert {p for name, p in _single(found) if name not in ("head", "embed")} == {(bits, 32)}
    assert {p for name, p in _single(found) if name in ("head", "embed")} == {(8, 32)}
    assert ("embed" in found) == (threshold == 0)
    assert model.vlm.decoder.blocks[0].qkv.bias is not None
    for decoding in (False, True):
        assert_near(logits(model, decoding), logits(exact), 0.997 if bits == 8 else 0.9)
    assert model.fingerprint != exact.fingerprint
    assert model.num_parameters == exact.num_parameters


def _single(found: dict[str, list[tuple[int, int]]]) -> list[tuple[str, tuple[int, int]]]:
    assert all(len(parts) == 1 for parts in found.values())
    return [(name, parts[0]) for name, parts in found.items()]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("threshold", [0, 1 << 28])
def test_unpacked_for_training(
    tied: bool, threshold: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "MAX_DENSE_WEIGHTS", threshold)
    save_qwen2(tmp_path / "model", tie_word_embeddings=tied, intermediate_size=64)
    model = visavis.load(tmp_path / "model", precision="int8", device="cpu")
    before = logits(model)
    unpack_linears(model.vlm.decoder)
    assert packed_of(model) == {}
    assert_near(logits(model), before)
    decoder = model.vlm.decoder
    assert (decoder.head.weight is decoder.embed.weight) == tied
    assert set(visavis.load(tmp_path / "model").vlm.state_dict()) == set(model.vlm.state_dict())


def test_towers_and_connectors_stay(tmp_path: Path) -> None:
    model = visavis.load(write_tiny_checkpoint(tmp_path / "tiny"), precision="int4", device="cpu")
    assert packed_of(model)
    others = [m for name, m in model.vlm.named_modules() if not name.startswith("decoder")]
    assert not any(isinstance(module, QuantizedLinear) for module in others)
    assert model.embed([picture(1)]).shape == (1, 16)


def test_a_pytorch_without_the_private_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files stay floating-point; integers that are asked for are refused, with what to do."""
    monkeypatch.setattr(quantize, "has_kernel", lambda: False)
    path = write_model(tmp_path / "model.gguf", "Q8_0")
    model = visavis.load(path, device="cpu")
    assert packed_of(model) == {}
    assert_near(logits(model), logits(visavis.load(path, precision="f32")))
    with pytest.raises(InputError, match="'int8' needs the compiled kernels.*visavis doctor"):
        visavis.load(path, precision="int8", device="cpu")


def test_integers_have_no_product_on_other_devices() -> None:
    config = VLMConfig(decoder=tiny_config())
    with pytest.raises(InputError, match="'int4' on cuda, expected cpu"):
        Quantizer(config, "int4", "cuda", where="model")


# ---- our own folders -----------------------------------------------------------------------------


def integers(model: visavis.Model) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{which}": tensor
        for name, module in model.vlm.named_modules()
        for which, tensor in module.named_buffers(recurse=False)
        if which in ("digits", "scales", "low", "high")
    }


@pytest.mark.parametrize("threshold", [0, 1 << 28])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_folder_of_integers_comes_back(
    precision: str, threshold: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "MAX_DENSE_WEIGHTS", threshold)
    save_qwen2(tmp_path / "model", intermediate_size=64)
    first = visavis.load(tmp_path / "model", precision=precision, device="cpu")
    done = convert(tmp_path / "model", tmp_path / "out", to="native", precision=precision)
    assert done.precision == precision
    again = visavis.load(tmp_path / "out", device="cpu")
    ours, theirs = integers(again), integers(first)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for decoding in (False, True):
        assert torch.equal(logits(again, decoding), logits(first, decoding))
    whole = visavis.load(tmp_path / "out", precision="bf16")
    assert packed_of(whole) == {}
    assert_near(logits(whole), logits(first))
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert names["decoder.blocks.0.up.weight.0.codes"].shape == (128, 32 if bits_of(first) else 16)


def bits_of(model: visavis.Model) -> bool:
    return packed_of(model)["blocks.0.up"][0][0] == 8


def test_fewer_bits_than_a_folder_holds(tmp_path: Path) -> None:
    save_qwen2(tmp_path / "model", intermediate_size=64)
    convert(tmp_path / "model", tmp_path / "out", to="native", precision="int8")
    found = packed_of(visavis.load(tmp_path / "out", precision="int4", device="cpu"))
    assert found["blocks.0.up"] == [(4, 32)] and found["head"] == [(8, 32)]
    assert packed_of(visavis.load(tmp_path / "out", precision="int8", device="cpu"))["head"]


def test_low_rank_pairs_and_mixed_parts_are_stored(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", "Q4_0", of_values="Q8_0")
    loaded = load_checkpoint(path, device="cpu")
    linear = loaded.vlm.decoder.blocks[0].qkv
    assert isinstance(linear, QuantizedLinear)
    dtype = loaded.vlm.decoder.dtype
    linear.low, linear.high = torch.randn(2, 64).to(dtype), torch.randn(128, 2).to(dtype)
    (tmp_path / "out").mkdir()
    write_native(loaded, tmp_path / "out")
    again = load_checkpoint(tmp_path / "out", device="cpu").vlm.decoder.blocks[0].qkv
    assert isinstance(again, QuantizedLinear) and again.low is not None
    x = torch.randn(2, 64).to(loaded.vlm.decoder.dtype)
    with packed_kernels():
        assert torch.equal(again(x), linear(x))
    assert_near(again(x), linear.product()(x))


@pytest.mark.parametrize("damage", ["no scales", "short scales", "types", "not finite"])
def test_integers_without_their_scales_are_named(damage: str, tmp_path: Path) -> None:
    save_qwen2(tmp_path / "model", intermediate_size=64)
    convert(tmp_path / "model", tmp_path / "out", to="native", precision="int4")
    path = tmp_path / "out" / "model.safetensors"
    tensors, name = load_file(path), "decoder.blocks.1.out.weight.0.scales"
    if damage == "no scales":
        del tensors[name]
    elif damage == "short scales":
        tensors[name] = tensors[name][1:].contiguous()
    elif damage == "types":
        tensors[name] = tensors[name].float()
    else:
        tensors[name][0] = torch.nan
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"integers of decoder\.blocks\.1\.out\.weight"):
        visavis.load(tmp_path / "out", device="cpu")


@pytest.mark.parametrize("to", ["transformers", "gguf"])
def test_other_layouts_have_no_place_for_them(to: str, tmp_path: Path) -> None:
    save_qwen2(tmp_path / "model")
    with pytest.raises(InputError, match="precision 'int4' was given for"):
        convert(tmp_path / "model", tmp_path / "out", to=to, precision="int4")


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.slow
def test_files_of_a_billion_weights_fit(tmp_path: Path) -> None:
    """Loaded, they take 1.15 times the file and 300 MB, and hardly more on the way."""
    script = Path(__file__).parents[2] / "benchmarks" / "memory.py"
    command = [sys.executable, str(script), "--json", str(tmp_path / "memory.json")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for row in json.loads((tmp_path / "memory.json").read_text(encoding="utf-8")):
        assert row["loaded"] <= row["limit"], row
        assert row["peak_loading"] <= 1.05 * row["limit"], row
