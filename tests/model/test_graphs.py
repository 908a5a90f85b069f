"""The static decode step: the ordinary path's tokens on the CPU, and on CUDA, where only its shapes
are seen here (fake tensors compute nothing), what the kernel asks for and no word to the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen  # registers the kernel
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.varlen import use_kernel
from visavis.model.attention import SequenceLayout
from visavis.model.config import DecoderConfig
from visavis.model.cuda_graphs import StaticDecoder, Step
from visavis.model.decoder import Decoder
from visavis.model.kv_cache import KVCache
from visavis.model.paged_kv_cache import PAGE, PagedCache, PagePool, has_kernel

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

CONFIG = DecoderConfig(50, 32, 2, 4, 2, 8, 48, 64)
FAMILIES = {
    "llama": CONFIG,
    "window": replace(CONFIG, sliding_window=5),
    "phi-2": replace(CONFIG, parallel_block=True, norm="layer", gated=False, rope_fraction=0.5),
    "gemma": replace(CONFIG, norm_offset=1.0, embedding_scale=5.7, num_kv_heads=1),
    "openelm": replace(CONFIG, num_heads=(4, 6), num_kv_heads=(2, 3), ffn_width=(48, 64)),
    "qwen2-vl": replace(CONFIG, mrope_sections=(1, 1, 2), qkv_bias=True, tied_head=False),
    "qk norm": replace(CONFIG, qk_norm=True),
}
PROMPTS = ([3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8], [9], [7, 9, 3, 2, 3], [8, 4])


def decoder_of(config: DecoderConfig) -> Decoder:
    torch.manual_seed(0)
    return Decoder(config).eval()


def read(decoder: Decoder, ids: list[int], cache: KVCache | PagedCache) -> Tensor:
    """Return the scores after some tokens."""
    positions = torch.arange(cache.length, cache.length + len(ids))
    layout = SequenceLayout.of((len(ids),), (cache,))
    hidden = decoder(decoder.embed_tokens(torch.tensor(ids)), positions, layout)[-1]
    return decoder.logits(hidden[-1:])[0]


def answer(decoder: Decoder, prompt: list[int], count: int) -> tuple[list[int], list[Tensor]]:
    """Return the tokens of the ordinary path, and the scores they were chosen from."""
    cache = KVCache(decoder.config, dtype=torch.float32)
    scores, tokens = [read(decoder, prompt, cache)], list[int]()
    for _ in range(count):
        tokens.append(int(scores[-1].argmax()))
        scores.append(read(decoder, tokens[-1:], cache))
    return tokens, scores[:-1]


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_tokens_are_those_of_the_ordinary_path(
    family: str, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences of different lengths, one more every few steps, the first gone before the last;
    with what the kernel would compute of its arguments too."""
    decoder = decoder_of(FAMILIES[family])
    pool = PagePool(decoder.config, dtype=torch.float32, max_bytes=1 << 18, page=4)
    static = StaticDecoder(decoder, pool)
    expected = [answer(decoder, prompt, 9) for prompt in PROMPTS]
    active: list[tuple[int, PagedCache, list[int]]] = []
    waiting, ended = list(range(len(PROMPTS))), 0
    if kernel:
        use_kernel(monkeypatch)
    while waiting or active:
        if waiting and len(active) < 3:
            number, cache = waiting.pop(0), PagedCache(pool)
            read(decoder, PROMPTS[number][:2], cache)  # a prompt in two parts
            cache.truncate(min(1, len(PROMPTS[number]) - 1))
            first = int(read(decoder, PROMPTS[number][cache.length :], cache).argmax())
            active.append((number, cache, [first]))
        caches = [cache for _, cache, _ in active]
        last = [tokens[-1] for _, _, tokens in active]
        rows = static(decoder, caches, last, [cache.length for cache in caches])
        for (number, _, tokens), row in zip(active, rows, strict=True):
            assert (row - expected[number][1][len(tokens)]).abs().max() <= 1e-4
            tokens.append(int(row.argmax()))
        for number, _, tokens in [one for one in active if len(one[2]) == 9]:
            assert tokens == expected[number][0]
            ended += 1
        active = [one for one in active if len(one[2]) < 9]
    del caches, cache, _
    assert ended == len(PROMPTS) and len(pool.free) == pool.num_pages - 1
    assert {size for size, _ in static.steps} == {1, 2, 4}


def test_plain_devices_have_no_static_decoder() -> None:
    assert StaticDecoder.of(decoder_of(CONFIG)) is None
    cuda = torch.device("cuda")
    assert has_kernel(cuda, torch.bfloat16, 128) and not has_kernel(cuda, torch.float32, 128)
    assert not has_kernel(cuda, torch.float16, 12) and not has_kernel(cuda, torch.float16, 264)
    assert not has_kernel(torch.device("cpu"), torch.bfloat16, 128)


# --- CUDA, its shapes alone -----------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Notes the kernel's arguments, and tensors that are made on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel: list[list[Any]] = []
        self.on_host: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.torch_attn._varlen_attn.default:
            self.kernel.append([*args, *[None] * (14 - len(args))])
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not result.is_cuda:
            self.on_host.append(func)
        return result


@contextmanager
def fake_cuda() -> Iterator[None]:
    with FakeTensorMode(), torch.device("cuda"), torch.inference_mode():
        yield


def half_decoder(config: DecoderConfig) -> tuple[Decoder, PagePool]:
    """Return a decoder in bfloat16, its norms in float32, and a pool."""
    with torch.device("meta"):
        decoder = Decoder(config).eval()
    for module in decoder.modules():
        half = isinstance(module, torch.nn.Linear | torch.nn.Embedding)
        for name, weight in module.named_parameters(recurse=False):
            empty = torch.empty(weight.shape, dtype=torch.bfloat16 if half else torch.float32)
            setattr(module, name, torch.nn.Parameter(empty, requires_grad=False))
    return decoder, PagePool(config, dtype=torch.bfloat16, max_bytes=1 << 22, device="cuda")


def check_pages(arguments: list[Any], pool: PagePool, layer: int, num: int, total: int) -> None:
    """Hold the arguments to what FlashAttention 2 checks before it starts."""
    query, key, value, starts, key_starts, longest, most = arguments[:7]
    used, table = arguments[11:13]
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16
    assert query.shape[0] == total and query.shape[2] == key.shape[3] <= 256
    assert key.shape == value.shape == pool.keys[layer].shape and key.shape[1] % PAGE == 0
    assert query.shape[1] % key.shape[2] == 0 and query.shape[2] % 8 == 0
    assert all(x.stride(-1) == 1 for x in (query, key, value, table))
    assert starts.shape == key_starts.shape == (num + 1,) and used.shape == (num,)
    assert table.shape == (num, most // PAGE) and longest <= total
    for numbers in (starts, key_starts, used, table):
        assert numbers.dtype == torch.int32 and numbers.is_cuda
    assert starts.is_contiguous() and key_starts.is_contiguous() and used.is_contiguous()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_on_cuda_is_what_a_graph_can_hold(family: str) -> None:
    """Nothing reads a number on the host (a fake tensor has none to give) or makes a tensor there;
    the kernel gets what it asks for."""
    config = FAMILIES[family]
    with fake_cuda():
        decoder, pool = half_decoder(config)
        static = StaticDecoder(decoder, pool)
        step = Step(pool, static.rotary, size=4, width=2)
        with Calls() as calls:
            scores = step.compute(decoder)
        with pytest.raises(RuntimeError):  # as the ordinary path would end here
            torch.zeros(4).max().item()
    assert scores.shape == (4, config.vocab_size) and scores.dtype == torch.float32
    assert len(calls.kernel) == config.num_layers and not calls.on_host
    for layer, arguments in enumerate(calls.kernel):
        check_pages(arguments, pool, layer, num=4, total=4)
        window = config.sliding_window
        assert arguments[5] == 1 and arguments[9] == ([window - 1, 0] if window else [-1, -1])


@pytest.mark.parametrize("past", [0, 300])
def test_a_prompt_on_cuda_reads_pages_only_where_there_is_a_past(past: int) -> None:
    with fake_cuda():
        decoder, pool = half_decoder(CONFIG)
        caches = (PagedCache(pool), PagedCache(pool))
        for cache in caches:
            cache.reserve(past)
            cache.length = past
        with torch.device("cpu"):
            layout = SequenceLayout.of((5, 260), caches)
        cos, sin = decoder.rope.table(600, pool.keys[0].device, torch.bfloat16)
        rotary = cos.narrow(0, 0, 265), sin.narrow(0, 0, 265)
        x = torch.zeros(265, CONFIG.width)
        with Calls() as calls:
            for block in decoder.blocks:
                x = block(x, rotary, layout)
    assert x.shape == (265, CONFIG.width) and [len(cache.pages) for cache in caches] == (
        [2, 3] if past else [1, 2]
    )
    for layer, arguments in enumerate(calls.kernel):
        assert arguments[5] == 260 and arguments[9] == [-1, 0]
        if past:
            check_pages(arguments, pool, layer, num=2, total=265)
        else:
            assert arguments[12] is None and arguments[1].shape == (265, 2, 8)
            assert arguments[4] is arguments[3] and arguments[3].shape == (3,)


# --- on a device ----------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_step_gives_the_eager_logits_again_and_again() -> None:
    decoder = decoder_of(replace(CONFIG, head_dim=16)).to("cuda", torch.bfloat16)
    static = StaticDecoder.of(decoder)
    if static is None:
        pytest.skip("this device has no kernel that reads pages")
    caches = [PagedCache(static.pool) for _ in range(2)]
    for length in range(20):  # every step has other lengths, and the second page is reached
        scores = static(decoder, caches, [length % 50, 7], [length, length])
        (step,) = {id(step): step for step in static.steps.values()}.values()
        eager = step.compute(decoder)[:2]  # writes the same keys to the same slots
        assert step.graph is not None
        torch.testing.assert_close(scores, eager, atol=2e-2, rtol=0)


def test_pool_and_graphs_stay_with_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 22, 1 << 23))
    with fake_cuda():
        decoder, _ = half_decoder(CONFIG)
        static = StaticDecoder.of(decoder)
        assert static is not None and StaticDecoder.of(decoder) is static
        bytes = static.pool.page_bytes * static.pool.num_pages
        assert (1 << 20) < bytes <= (1 << 21)  # half of what is free
        static.steps[1, 1] = Step(static.pool, static.rotary, 1, 1)
        decoder.norm.weight = torch.nn.Parameter(torch.zeros(CONFIG.width).double())
        again = StaticDecoder.of(decoder)
        assert again is static and not static.steps
