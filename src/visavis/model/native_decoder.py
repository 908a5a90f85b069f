"""A decoder's forward pass in one call of the compiled kernels, on the CPU.

Tokens of one or several sequences pass through all layers; their keys and values go to the caches
that the PyTorch path uses, in the same type. Between linears everything is float32. What a token
gets depends only on the tokens before it: bitwise the same alone and in company, in one pass and in
several, on one thread and on many.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate, chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from visavis.model.attention import SequenceLayout
from visavis.model.config import DecoderConfig
from visavis.model.decoder import Block, Decoder, DeepStack, Norm
from visavis.model.kv_cache import KVCache
from visavis.model.native_rows import PLAIN, library, linear_of, plain_matrix
from visavis.model.paged_kv_cache import Cache
from visavis.model.quantized_linear import QuantizedLinear
from visavis.native import library as api

# Of a cache: its first and last tensor when the pointers were taken, and the pointers.
Pointers = tuple[Tensor, Tensor, Any, Any]
AT_A_TIME = 1024  # tokens of sequences without caches that keys and values are kept of


class NativeDecoder:
    """A decoder's weights at hand for the kernels; inference only.

    Weights are read where they lie: build it anew when modules of the decoder were replaced.
    """

    def __init__(self, decoder: Decoder) -> None:
        assert can_run(decoder)
        config, self.kept = decoder.config, list[object]()
        self.pointers = WeakKeyDictionary[KVCache, Pointers]()
        self.config, self.rope, self.dtype = config, decoder.rope, decoder.dtype
        layers = [_layer(block, config, i, self.kept) for i, block in enumerate(decoder.blocks)]
        self.model = api.Model(
            layers=(api.Layer * len(layers))(*layers),
            norm=_norm(decoder.norm, self.kept),
            head=_linear(decoder.head, self.kept),
            num_layers=len(layers),
            width=config.width,
            head_dim=config.head_dim,
            rotary_dim=config.rotary_dim,
            window=config.sliding_window,
            layer_norm=config.norm == "layer",
            gated=config.gated,
            activation=api.ACTIVATIONS[config.activation],
            cache_format=api.FORMATS[PLAIN[self.dtype]],
            eps=config.norm_eps,
        )

    def takes(self, x: Tensor, layout: SequenceLayout) -> bool:
        """Return whether the kernels compute this pass: without gradients, on the CPU."""
        if x.device.type != "cpu" or (torch.is_grad_enabled() and x.requires_grad):
            return False
        return layout.paging is None and all(
            isinstance(cache, KVCache) and cache.keys[0].dtype == self.dtype
            for cache in layout.caches
        )

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        layout: SequenceLayout,
        layers: Collection[int],
        deepstack: DeepStack | None = None,
    ) -> dict[int, Tensor]:
        """Do what `Decoder.forward` does."""
        last = len(self.model.layers[: self.model.num_layers])
        wanted = {layer: layer % (last + 1) for layer in layers}
        highest = max(wanted.values())
        found = {n: torch.empty(x.shape) for n in set(wanted.values()) if n < last}
        out = torch.empty(x.shape)
        caches = [cache for cache in layout.caches if isinstance(cache, KVCache)]
        added = (
            []
            if deepstack is None
            else [
                deepstack.add(torch.zeros(x.shape), number)
                for number in range(len(deepstack.features))
            ]
        )
        for rows, lengths, own in self._parts(layout.lengths, caches):
            out[rows] = self._run(
                x[rows],
                positions[..., rows],
                own,
                lengths,
                layers=highest,
                states={n: state[rows] for n, state in found.items()},
                added=[features[rows] for features in added],
            )
        found[last] = out
        return {layer: found[number] for layer, number in wanted.items()}

    def logits(self, hidden: Tensor) -> Tensor:
        """Do what `Decoder.logits` does; in float32 up to the head."""
        x = hidden.detach().float().contiguous()
        scores, threads = torch.empty(len(x), self.config.vocab_size), torch.get_num_threads()
        head = ctypes.byref(self.model.head)
        api.check(library().vv_product(head, x.data_ptr(), len(x), scores.data_ptr(), threads))
        return scores

    def scores(self, x: Tensor, positions: Tensor, caches: Sequence[Cache]) -> Tensor:
        """Extend caches by the tokens x [T, D], all by equally many; return the scores of what
        follows each token, float32 [T, vocab]."""
        own = [cache for cache in caches if isinstance(cache, KVCache)]
        assert len(own) == len(caches) and len(x) % len(caches) == 0
        scores = torch.empty(len(x), self.config.vocab_size)
        lengths = (len(x) // len(caches),) * len(caches)
        self._run(x, positions, own, lengths, layers=self.model.num_layers, scores=scores)
        return scores

    def _fill(self, sequence: api.Sequence, cache: KVCache, count: int) -> None:
        """Describe a cache with room for `count` more tokens."""
        cache.reserve(cache.length + count)
        known = self.pointers.get(cache)
        ends = cache.keys[0], cache.values[-1]
        if known is None or known[0] is not ends[0] or known[1] is not ends[1]:
            stores, array = (cache.keys, cache.values), ctypes.c_void_p * len(cache.keys)
            keys, values = (array(*(one.data_ptr() for one in store)) for store in stores)
            known = self.pointers[cache] = (*ends, keys, values)
        sequence.count, sequence.past, sequence.capacity = count, cache.length, cache.capacity
        sequence.keys, sequence.values = known[2:]

    def _parts(
        self, lengths: Sequence[int], caches: Sequence[KVCache]
    ) -> Iterator[tuple[slice, Sequence[int], Sequence[KVCache]]]:
        """Yield some sequences after another: their tokens, their lengths, a cache for each."""
        if caches:
            yield slice(0, sum(lengths)), lengths, caches
            return
        starts, first = [0, *accumulate(lengths)], 0
        while first < len(lengths):
            end = first + 1
            while end < len(lengths) and starts[end + 1] - starts[first] <= AT_A_TIME:
                end += 1
            some = lengths[first:end]
            own = [KVCache(self.config, dtype=self.dtype, capacity=length) for length in some]
            yield slice(starts[first], starts[end]), some, own
            first = end

    def _run(
        self,
        x: Tensor,
        positions: Tensor,
        caches: Sequence[KVCache],
        lengths: Sequence[int],
        *,
        layers: int,
        states: dict[int, Tensor] | None = None,
        added: Sequence[Tensor] = (),
        scores: Tensor | None = None,
    ) -> Tensor:
        """Extend caches by tokens; return hidden states after the last norm."""
        assert sum(lengths) == len(x) == positions.shape[-1] and len(lengths) == len(caches)
        x = x.detach().to(torch.float32, copy=True).contiguous()
        cos, sin = (table.flatten(1).contiguous() for table in self.rope(positions, torch.float32))
        sequences = (api.Sequence * len(caches))()
        pairs = zip(sequences, caches, lengths, strict=True)
        for sequence, cache, length in pairs:
            self._fill(sequence, cache, length)
        model = self.model
        if layers < model.num_layers:
            model = api.Model.from_buffer_copy(model)
            model.num_layers = layers
        wanted = None
        if states:
            addresses = {n: state.data_ptr() for n, state in states.items()}
            wanted = (ctypes.c_void_p * (layers + 1))(*map(addresses.get, range(layers + 1)))
        more = None
        if added:
            own = [features.data_ptr() for features in added[:layers]]
            more = (ctypes.c_void_p * layers)(*own, *[None] * (layers - len(own)))
        numbers = torch.arange(0 if scores is None else len(x))
        api.check(
            library().vv_forward(
                ctypes.byref(model),
                sequences,
                len(caches),
                x.data_ptr(),
                cos.data_ptr(),
                sin.data_ptr(),
                wanted,
                more,
                numbers.data_ptr(),
                len(numbers),
                None if scores is None else scores.data_ptr(),
                torch.get_num_threads(),
            )
        )
        for cache, length in zip(caches, lengths, strict=True):
            cache.advance(length)
        return x


def can_run(decoder: Decoder) -> bool:
    """Return whether the kernels compute this decoder: it is on the CPU, its linears are packed for
    them or plain, and they are compiled."""
    if api.native() is None or decoder.norm.weight.device.type != "cpu":
        return False
    if not decoder.config.causal:
        return False
    if decoder.dtype not in PLAIN or decoder.config.activation not in api.ACTIVATIONS:
        return False
    blocks = [block for block in decoder.blocks if isinstance(block, Block)]
    linears = chain.from_iterable((b.qkv, b.out, b.up, b.down) for b in blocks)
    return len(blocks) == len(decoder.blocks) and all(
        _can_read(linear) for linear in (decoder.head, *linears)
    )


def _can_read(linear: nn.Module) -> bool:
    if isinstance(linear, QuantizedLinear):
        low_rank = linear.low_rank or ()
        return bool(linear.native_parts) and all(part.dtype in PLAIN for part in low_rank)
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        return False  # more than a linear, such as one with an adapter in training
    return linear.weight.dtype in PLAIN and bool(linear.weight.is_contiguous())


def _floats(tensor: Tensor | None, kept: list[object]) -> int | None:
    """Return the address of a tensor as float32: its own memory where it is that already."""
    if tensor is None:
        return None
    tensor = tensor.detach().float().contiguous()
    kept.append(tensor)
    return tensor.data_ptr()


def _norm(norm: nn.Module | None, kept: list[object]) -> api.Norm:
    if norm is None:
        return api.Norm(None, None)
    assert isinstance(norm, Norm)
    weight: Tensor = norm.weight
    if norm.offset:
        weight = weight + norm.offset
    return api.Norm(_floats(weight, kept), _floats(norm.bias, kept))


def _linear(linear: nn.Module, kept: list[object]) -> api.Linear:
    low_rank = None
    if isinstance(linear, QuantizedLinear):
        matrices, low_rank = [part.matrix() for part in linear.native_parts], linear.low_rank
    else:
        assert isinstance(linear, nn.Linear)
        matrices = [plain_matrix(linear.weight.detach())]
    bias = linear.bias
    assert bias is None or isinstance(bias, Tensor)
    found, things = linear_of(matrices, bias, low_rank)
    kept += (linear, *things)
    return found


def _layer(block: nn.Module, config: DecoderConfig, number: int, kept: list[object]) -> api.Layer:
    assert isinstance(block, Block)
    norms = ("attn_norm", "ffn_norm", "q_norm", "k_norm")
    linears = ("qkv", "out", "up", "down")
    return api.Layer(
        **{name: _norm(getattr(block, name), kept) for name in norms},
        **{name: _linear(getattr(block, name), kept) for name in linears},
        heads=config.per_layer(config.num_heads, number),
        kv_heads=config.per_layer(config.num_kv_heads, number),
        ffn_width=config.per_layer(config.ffn_width, number),
    )
