"""TinyLLaVA's connectors against plain re-derivations of their formulas, by the names of its files.

The Q-Former also against transformers' own. The re-derivations share nothing with ours: explicit
loops over heads, softmax written out.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from tests.parity.peers import assert_close, randomized
from visavis.checkpoints.tinyllava.connectors import connector_rows, ignored_names
from visavis.checkpoints.weight_mapping import NameTable, to_ours, to_theirs
from visavis.model.config import ConnectorConfig
from visavis.model.connectors import build_connector

pytestmark = pytest.mark.parity

PREFIX = "connector._connector"
IN, OUT, PATCHES = 24, 32, 11
State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


def random_state(shapes: Shapes, seed: int = 0) -> State:
    """Return tensors of these shapes, scales of norms near one."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        is_scale = len(shape) == 1 and name.endswith("weight")
        state[name] = 1 + 0.2 * noise if is_scale else noise * (shape[-1] ** -0.5)
    return state


def linear(state: State, name: str, x: Tensor) -> Tensor:
    bias = state.get(f"{name}.bias")
    y = x @ state[f"{name}.weight"].T
    return y if bias is None else y + bias


def layer_norm(x: Tensor, state: State, name: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return normed * state.get(f"{name}.weight", 1.0) + state.get(f"{name}.bias", 0.0)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attention(q: Tensor, k: Tensor, v: Tensor, head_dim: int = 64) -> Tensor:
    """One image: queries [Q, H * d], keys and values [P, H * d]."""
    heads = zip(*(x.split(head_dim, -1) for x in (q, k, v)), strict=True)
    mixed = []
    for one_q, one_k, one_v in heads:
        scores = one_q @ one_k.T * head_dim**-0.5
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        mixed.append(weights / weights.sum(-1, keepdim=True) @ one_v)
    return torch.cat(mixed, -1)


# --- formulas, for one image [P, W] ---------------------------------------------------------------


def mlp(state: State, features: Tensor, prefix: str = "") -> Tensor:
    places = sorted({int(name.removeprefix(prefix).split(".")[0]) for name in state
                     if name.startswith(prefix)})  # fmt: skip
    for place in places:
        features = linear(state, f"{prefix}{place}", features if place == 0 else gelu(features))
    return features


def mixture(state: State, features: Tensor) -> Tensor:
    clip, dino = features.split(IN // 2, -1)
    tokens = torch.empty(2 * len(features), OUT)
    tokens[0::2] = mlp(state, clip, "clip.")
    tokens[1::2] = mlp(state, dino, "dinov2.")
    return tokens


def resampler(state: State, features: Tensor) -> Tensor:
    media, latents = linear(state, "linear", features), state["latents"]
    for layer in range(3):
        at = f"layers.{layer}"
        normed = layer_norm(latents, state, f"{at}.0.norm_latents", 1e-5)
        seen = torch.cat((layer_norm(media, state, f"{at}.0.norm_media", 1e-5), normed))
        k, v = linear(state, f"{at}.0.to_kv", seen).chunk(2, -1)
        mixed = attention(linear(state, f"{at}.0.to_q", normed), k, v)
        latents = latents + linear(state, f"{at}.0.to_out", mixed)
        hidden = linear(state, f"{at}.1.1", layer_norm(latents, state, f"{at}.1.0", 1e-5))
        latents = latents + linear(state, f"{at}.1.3", gelu(hidden))
    return layer_norm(latents, state, "norm", 1e-5)


def qformer(state: State, features: Tensor) -> Tensor:
    eps = 1e-12

    def attend(x: Tensor, seen: Tensor, name: str) -> Tensor:
        q, k, v = (
            linear(state, f"{name}.self.{part}", source)
            for part, source in (("query", x), ("key", seen), ("value", seen))
        )
        mixed = linear(state, f"{name}.output.dense", attention(q, k, v))
        return layer_norm(x + mixed, state, f"{name}.output.LayerNorm", eps)

    x = layer_norm(state["query_tokens"][0], {}, "", eps)
    for layer in range(3):
        at = f"bert.encoder.layer.{layer}"
        x = attend(x, x, f"{at}.attention")
        if layer in (0, 2):
            x = attend(x, features, f"{at}.crossattention")
        hidden = gelu(linear(state, f"{at}.intermediate_query.dense", x))
        hidden = x + linear(state, f"{at}.output_query.dense", hidden)
        x = layer_norm(hidden, state, f"{at}.output_query.LayerNorm", eps)
    return linear(state, "projector", x)


# --- shapes, by the names of the files ------------------------------------------------------------


def linear_shapes(name: str, inside: int, outside: int, bias: bool = True) -> Shapes:
    biases: Shapes = {f"{name}.bias": (outside,)} if bias else {}
    return {f"{name}.weight": (outside, inside)} | biases


def norm_shapes(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def mlp_shapes(prefix: str, inside: int, depth: int) -> Shapes:
    shapes = linear_shapes(f"{prefix}0", inside, OUT)
    for n in range(1, depth):
        shapes |= linear_shapes(f"{prefix}{2 * n}", OUT, OUT)
    return shapes


def resampler_shapes() -> Shapes:
    shapes: Shapes = {"latents": (7, OUT)}
    shapes |= linear_shapes("linear", IN, OUT) | norm_shapes("norm", OUT)
    for layer in range(3):
        at = f"layers.{layer}"
        for name in ("0.norm_media", "0.norm_latents", "1.0"):
            shapes |= norm_shapes(f"{at}.{name}", OUT)
        for name, inside, outside in (("0.to_q", OUT, 512), ("0.to_kv", OUT, 1024),
                                      ("0.to_out", 512, OUT), ("1.1", OUT, 4 * OUT),
                                      ("1.3", 4 * OUT, OUT)):  # fmt: skip
            shapes |= linear_shapes(f"{at}.{name}", inside, outside, bias=False)
    return shapes


def qformer_shapes(width: int = 128) -> Shapes:
    shapes: Shapes = {"query_tokens": (1, 5, width)} | linear_shapes("projector", width, OUT)
    for layer in range(3):
        at = f"bert.encoder.layer.{layer}"
        reads = {"crossattention": IN} if layer in (0, 2) else {}
        for name, seen in ({"attention": width} | reads).items():
            shapes |= linear_shapes(f"{at}.{name}.self.query", width, width)
            shapes |= linear_shapes(f"{at}.{name}.self.key", seen, width)
            shapes |= linear_shapes(f"{at}.{name}.self.value", seen, width)
            shapes |= linear_shapes(f"{at}.{name}.output.dense", width, width)
            shapes |= norm_shapes(f"{at}.{name}.output.LayerNorm", width)
        shapes |= linear_shapes(f"{at}.intermediate_query.dense", width, 4 * width)
        shapes |= linear_shapes(f"{at}.output_query.dense", 4 * width, width)
        shapes |= norm_shapes(f"{at}.output_query.LayerNorm", width)
    return shapes


CASES: dict[str, tuple[ConnectorConfig, Shapes, Callable[[State, Tensor], Tensor]]] = {
    "mlp1x_gelu": (ConnectorConfig("mlp", IN, OUT, depth=1), mlp_shapes("", IN, 1), mlp),
    "mlp3x_gelu": (ConnectorConfig("mlp", IN, OUT, depth=3), mlp_shapes("", IN, 3), mlp),
    "mof_mlp": (
        ConnectorConfig("mixture", IN, OUT, depth=2),
        mlp_shapes("clip.", IN // 2, 2) | mlp_shapes("dinov2.", IN // 2, 2),
        mixture,
    ),
    "resampler": (
        ConnectorConfig("resampler", IN, OUT, depth=3, num_queries=7), resampler_shapes(), resampler
    ),
    "qformer": (
        ConnectorConfig("qformer", IN, OUT, depth=3, num_queries=5, hidden_width=128),
        qformer_shapes(),
        qformer,
    ),
}  # fmt: skip


def table_of(config: ConnectorConfig) -> NameTable:
    return NameTable(connector_rows(config, PREFIX), ignored=ignored_names(config, PREFIX))


def loaded_state(config: ConnectorConfig, theirs: State) -> State:
    """Return the state of our connector from tensors by the names of the files."""
    own = build_connector(config).state_dict()
    shapes = {f"connector.{name}": tuple(tensor.shape) for name, tensor in own.items()}
    named = {f"{PREFIX}.{name}": tensor for name, tensor in theirs.items()}
    found = to_ours(named, table_of(config), shapes, lambda _: {}, where="the test")
    return {name.removeprefix("connector."): tensor for name, tensor in found.items()}


@pytest.mark.parametrize("kind", CASES)
@torch.no_grad()
def test_tokens_and_names(kind: str) -> None:
    config, shapes, formula = CASES[kind]
    state = random_state(shapes)
    ours = build_connector(config)
    extra = {"bert.embeddings.position_ids": torch.arange(512)[None]} if kind == "qformer" else {}
    ours.load_state_dict(loaded_state(config, state | extra))
    features = torch.randn(3, PATCHES, IN, generator=torch.Generator().manual_seed(1))
    expected = torch.stack([formula(state, one) for one in features])
    assert_close(ours(features), expected, kind)
    named = {f"connector.{name}": tensor for name, tensor in ours.state_dict().items()}
    back = to_theirs(named, table_of(config), lambda _: {})
    assert back.keys() == {f"{PREFIX}.{name}" for name in state}
    assert all(torch.equal(back[f"{PREFIX}.{name}"], tensor) for name, tensor in state.items())


@torch.no_grad()
def test_qformer_is_transformers_own() -> None:
    """Its BLIP-2 class, whose embedding norm has weights: left at one and zero here."""
    width = 128
    peer = Blip2QFormerModel(
        Blip2QFormerConfig(
            hidden_size=width,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=4 * width,
            encoder_hidden_size=IN,
            cross_attention_frequency=2,
        )
    )
    randomized(peer)
    peer.layernorm.weight.fill_(1)
    peer.layernorm.bias.zero_()
    queries = torch.randn(1, 5, width)
    state: State = {"query_tokens": queries, "projector.weight": torch.eye(OUT, width)}
    state["projector.bias"] = torch.zeros(OUT)
    for name, tensor in peer.state_dict().items():
        if name.startswith("encoder."):
            name = name.replace(".attention.attention.", ".attention.self.")
            name = name.replace(".crossattention.attention.", ".crossattention.self.")
            state[f"bert.{name}"] = tensor
    config = CASES["qformer"][0]
    ours = build_connector(config)
    ours.load_state_dict(loaded_state(config, state))
    features = torch.randn(2, PATCHES, IN)
    theirs = peer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
    assert_close(ours(features), theirs[..., :OUT], "Q-Former of transformers")
