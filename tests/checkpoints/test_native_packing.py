"""Checkpoints as the compiled kernels take them: exact values of files, integers of any weights."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import pytest
import torch

import visavis
from tests.checkpoints.test_quantize import assert_near, logits, write_model
from tests.checkpoints.transformers_files import save_qwen2
from visavis.checkpoints.gguf.decoder import decoder_state
from visavis.checkpoints.gguf.reader import open_gguf
from visavis.checkpoints.quantize import unpack_linears
from visavis.convert.conversion import convert
from visavis.errors import CheckpointWarning, InputError
from visavis.generate.prefix_cache import PrefixCache
from visavis.model.native_rows import NativeRows
from visavis.model.quantized_linear import QuantizedEmbedding, QuantizedLinear
from visavis.native import library
from visavis.native.library import native

pytestmark = pytest.mark.skipif(native() is None, reason="the kernels are not compiled here")


def kinds_of(model: visavis.Model) -> dict[str, list[str]]:
    """Return the types of every packed matrix's parts by its module's name."""
    found = {}
    for name, module in model.vlm.decoder.named_modules():
        if isinstance(module, QuantizedLinear):
            assert module.dense is None
            found[name] = [p.kind for p in module.rows if isinstance(p, NativeRows)]
            assert len(found[name]) == len(module.rows)
    return found


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("tied", [True, False])
def test_files_keep_their_values(kind: str, tied: bool, tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", kind, of_values="Q8_0", tied_head=tied)
    model, exact = visavis.load(path, device="cpu"), visavis.load(path, precision="f32")
    found = kinds_of(model)
    assert found.pop("blocks.0.qkv") == ([kind] if kind == "Q8_0" else [kind, "Q8_0"])
    assert {tuple(kinds) for name, kinds in found.items() if "qkv" not in name} == {(kind,)}
    assert isinstance(model.vlm.decoder.embed, QuantizedEmbedding)
    assert model.vlm.decoder.compiled is not None and exact.vlm.decoder.compiled is None
    assert_near(logits(model), logits(exact), 0.996)
    stored = dict(decoder_state(open_gguf(path)))
    for name, module in model.vlm.decoder.named_modules():
        if isinstance(module, QuantizedLinear):
            rows = [p.values(torch.arange(p.num_rows)) for p in module.rows]  # type: ignore[call-overload]
            key = "embed" if tied and name == "head" else name
            assert torch.equal(torch.cat(rows), torch.from_numpy(stored[f"decoder.{key}.weight"]))


def test_scales_that_are_not_finite_are_warned_of(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", "Q8_0")
    info = open_gguf(path).tensors["blk.1.ffn_down.weight"]
    content = bytearray(path.read_bytes())
    content[info.offset : info.offset + 2] = np.array(np.inf, "<f2").tobytes()
    path.write_bytes(content)
    with pytest.warns(CheckpointWarning, match="blocks.1.down.weight of .* holds NaN or infinite"):
        visavis.load(path, device="cpu")


@pytest.mark.parametrize(("precision", "kind"), [("int8", "A8"), ("int4", "Q4_1")])
@pytest.mark.parametrize("tied", [True, False])
def test_any_weights_become_integers(precision: str, kind: str, tied: bool, tmp_path: Path) -> None:
    save_qwen2(tmp_path / "model", tie_word_embeddings=tied, intermediate_size=64)
    model = visavis.load(tmp_path / "model", precision=precision, device="cpu")
    exact = visavis.load(tmp_path / "model", precision="f32")
    kinds = kinds_of(model)
    assert kinds.pop("head") == kinds.pop("embed") == ["A8"]
    assert {tuple(found) for found in kinds.values()} == {(kind,)}
    assert_near(logits(model), logits(exact), 0.997 if precision == "int8" else 0.9)
    assert model.num_parameters == exact.num_parameters
    # and come back from a folder of our own
    convert(tmp_path / "model", tmp_path / "out", to="native", precision=precision)
    again = visavis.load(tmp_path / "out", device="cpu")
    assert kinds_of(again)["blocks.0.up"] == [kind]
    assert_near(logits(again), logits(model), 0.9999)
    before = logits(model)
    unpack_linears(model.vlm.decoder)
    assert kinds_of(model) == {} and model.vlm.decoder.compiled is None
    assert_near(logits(model), before)


def test_one_switch_turns_them_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_kernels: None
) -> None:
    path = write_model(tmp_path / "model.gguf", "Q4_0")
    off = visavis.load(path, device="cpu")
    assert off.vlm.decoder.compiled is None
    monkeypatch.setenv(library.VARIABLE, "portable")
    library.find.cache_clear()
    on = visavis.load(path, device="cpu", precision="int4")
    assert on.vlm.decoder.compiled is not None
    assert on.fingerprint != off.fingerprint or not torch.equal(logits(on), logits(off))
    assert_near(logits(on), logits(off), 0.99)
    foreign = "avx2" if platform.machine() in ("arm64", "aarch64") else "neon"
    for wrong in ("fast", foreign):
        monkeypatch.setenv(library.VARIABLE, wrong)
        library.find.cache_clear()
        with pytest.raises(InputError, match=f"VISAVIS_NATIVE='{wrong}'"):
            native()
    monkeypatch.setenv(library.VARIABLE, "1")
    library.find.cache_clear()
    restored = native()
    assert restored is not None
    restored.vv_set_level(None)


def test_nothing_around_it_changes_an_answer(nano_files: dict[str, Path]) -> None:
    """The real SmolLM2, greedy: alone, in company, repeated, with every cache, guessing or not."""
    model = visavis.load(nano_files["language_model"])
    prompts = [
        "Repeat this twice: the cat sat on the mat and the dog sat on the cat.",
        "What is the capital of France, and what is it known for?",
        "Say the word blue.",
        "Repeat this twice: the cat sat on the mat and the dog sat on the hat.",
    ]
    model.prefixes = None
    alone = [model.chat(prompt, max_new_tokens=20).text for prompt in prompts]
    assert [reply.text for reply in model.chat_many(prompts, max_new_tokens=20)] == alone
    model.prefixes = PrefixCache()
    for _ in range(2):
        assert [model.chat(prompt, max_new_tokens=20).text for prompt in prompts] == alone
        together = model.chat_many(prompts, max_new_tokens=20, max_sequences=3)
        assert [reply.text for reply in together] == alone
    vectors = model.embed(prompts)
    single = np.concatenate([model.embed([prompt]) for prompt in prompts])
    assert np.array_equal(vectors, single)
