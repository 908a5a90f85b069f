"""The name-mapping engine: both directions, idempotence, and errors that name the tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from visavis.checkpoints.weight_mapping import (
    MappingRow,
    NameTable,
    compiled,
    fill,
    to_ours,
    to_theirs,
)
from visavis.errors import CheckpointError

TABLE = NameTable(
    rows=(
        MappingRow("blocks.*.qkv", ("layer.*.q", "layer.*.k", "layer.*.v"), ("q", "kv", "kv")),
        MappingRow("blocks.*.out", ("layer.*.o",)),
        MappingRow("token", ("cls_token",), unit_axes=2),
        MappingRow("blocks.*.up", ("layer.*.fused_up",)),
        MappingRow("blocks.*.up", ("layer.*.gate", "layer.*.up"), ("ffn", "ffn")),
    ),
    aliases=(("old.**", "layer.**"), ("layer.*.query", "layer.*.q")),
    ignored=("**.inv_freq",),
)
SIZES = {"q": 4, "kv": 2, "ffn": 3}
EXPECTED = {
    "token": (5,),
    **{
        f"blocks.{layer}.{name}": shape
        for layer in (0, 1)
        for name, shape in {"qkv": (8, 5), "out": (5, 4), "up": (6, 5)}.items()
    },
}


def theirs() -> dict[str, Tensor]:
    shapes = {"q": (4, 5), "k": (2, 5), "v": (2, 5), "o": (5, 4), "fused_up": (6, 5)}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"layer.{layer}.{name}": torch.randn(shape, generator=generator)
        for layer in (0, 1)
        for name, shape in shapes.items()
    }
    return tensors | {"cls_token": torch.randn(1, 1, 5, generator=generator)}


def ours(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return to_ours(tensors, TABLE, EXPECTED, lambda _: SIZES, where="the file")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_fuses_in_the_order_of_the_row() -> None:
    tensors = theirs()
    state = ours(tensors)
    parts = [tensors[f"layer.1.{name}"] for name in "qkv"]
    assert torch.equal(state["blocks.1.qkv"], torch.cat(parts))
    assert torch.equal(state["token"], tensors["cls_token"][0, 0])
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == EXPECTED


@given(st.permutations(sorted(theirs())))
def test_goes_there_and_back_whatever_the_order(order: list[str]) -> None:
    tensors = theirs()
    state = ours({name: tensors[name] for name in order})
    assert same(to_theirs(state, TABLE, lambda _: SIZES), tensors)


def test_is_idempotent_both_ways() -> None:
    state = ours(theirs())
    assert same(ours(state), state)
    assert same(to_theirs(theirs(), TABLE, lambda _: SIZES), theirs())


def test_aliases_apply_one_after_the_other() -> None:
    tensors = theirs()
    tensors["old.0.query"] = tensors.pop("layer.0.q")
    assert same(ours(tensors), ours(theirs()))


def test_either_row_of_a_tensor_may_stand_for_it() -> None:
    tensors = theirs()
    gate, up = tensors.pop("layer.0.fused_up").split(3)
    tensors |= {"layer.0.up": up, "layer.0.gate": gate}
    assert same(ours(tensors), ours(theirs()))


def test_ignored_names_are_left_out() -> None:
    assert same(ours(theirs() | {"layer.0.rope.inv_freq": torch.ones(2)}), ours(theirs()))


def change(name: str, tensor: Tensor | None) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("layer.1.k", None), "missing layer.1.k;|missing layer.1.k\\."),
        (change("cls_token", None), "missing cls_token"),
        (change("layer.1.fused_up", None), "missing layer.1.fused_up"),
        (change("layer.0.bias", torch.ones(3)), "unexpected layer.0.bias"),
        (change("layer.2.o", torch.ones(5, 4)), "unexpected layer.2.o"),  # beyond the config
        (change("old.0.q", torch.ones(4, 5)), "old.0.q and layer.0.q are the same"),
        (change("blocks.0.out", torch.ones(5, 4)), "blocks.0.out and layer.0.o are the same"),
        (change("layer.0.gate", torch.ones(3, 5)), "the same tensor"),
        (change("layer.0.o", torch.ones(4, 5)), r"layer.0.o has shape \(4, 5\), expected \(5, 4\)"),
        (change("cls_token", torch.ones(2, 1, 5)), r"cls_token has shape \(2, 1, 5\)"),
        (change("layer.0.k", torch.tensor(1.0)), r"layer.0.k has shape \(\)"),
    ],
)
def test_what_does_not_fit_is_named(
    damage: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    tensors = theirs()
    damage(tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        ours(tensors)
    assert "the file" in str(caught.value)


def test_parts_of_another_size_are_refused_even_if_their_sum_fits() -> None:
    tensors = theirs()
    tensors["layer.0.q"], tensors["layer.0.k"] = torch.ones(2, 5), torch.ones(4, 5)
    with pytest.raises(CheckpointError, match=r"layer.0.q has shape \(2, 5\), expected \(4, 5\)"):
        ours(tensors)


def test_a_long_list_is_cut_and_counted() -> None:
    with pytest.raises(CheckpointError, match="and 5 more"):  # 2 layers x 5, the token: 11
        ours({})


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [("blocks.0.qkv", torch.ones(9, 5), "9 rows, expected 8"), ("what", torch.ones(1), "what")],
)
def test_writing_refuses_what_no_row_holds(name: str, tensor: Tensor, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        to_theirs(ours(theirs()) | {name: tensor}, TABLE, lambda _: SIZES)


def test_patterns() -> None:
    one, rest = compiled("a.*.c"), compiled("a.**")
    assert one.fullmatch("a.11.c") and not one.fullmatch("a.1.2.c") and not one.fullmatch("a..c")
    assert rest.fullmatch("a.1.2") and not rest.fullmatch("b.1")
    assert not compiled("a.b").fullmatch("aXb")  # a dot is a dot
    assert fill("x.*.y.**", ("3", "z.w")) == "x.3.y.z.w"
