"""Mixtures: what is drawn follows from seed and weights alone, and each sample gets its turn."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.data_files import opened, write_lines
from visavis.data.examples import estimated_tokens
from visavis.data.sampler import DrawnExample, SourceSampler, SourceShare, dealt

SIZES = st.dictionaries(st.sampled_from("abcd"), st.integers(1, 9), min_size=1)
BLOCKS = st.integers(0, 5)


def drawn(mixture: SourceSampler, number: int) -> list[DrawnExample]:
    return mixture.batch(number)


@given(SIZES, BLOCKS, st.integers(0, 9))
def test_without_weights_each_sample_comes_once_an_epoch(
    sizes: dict[str, int], block: int, seed: int
) -> None:
    mixture = SourceSampler(
        {name: SourceShare(size, block=block) for name, size in sizes.items()}, seed
    )
    everything = {(name, number) for name, size in sizes.items() for number in range(size)}
    orders = []
    for _ in range(3):
        epoch = drawn(mixture, mixture.size)
        assert len(epoch) == len(everything) and set(epoch) == everything
        orders.append(tuple(epoch))
    if len(everything) > 6 and not block:
        assert len(set(orders)) > 1


@given(SIZES, BLOCKS, st.integers(0, 9), st.lists(st.integers(1, 7), max_size=6))
def test_batches_of_any_sizes_are_cut_from_one_stream(
    sizes: dict[str, int], block: int, seed: int, batches: list[int]
) -> None:
    shares = {name: SourceShare(size, 1.0, block) for name, size in sizes.items()}
    whole = drawn(SourceSampler(shares, seed), sum(batches))
    cut = SourceSampler(shares, seed)
    assert list(itertools.chain(*(drawn(cut, size) for size in batches))) == whole


@given(SIZES, BLOCKS, st.booleans(), st.integers(0, 20), st.integers(1, 20))
def test_a_run_goes_on_from_its_state(
    sizes: dict[str, int], block: int, weighted: bool, before: int, after: int
) -> None:
    shares = {
        name: SourceShare(size, 0.5 if weighted else None, block) for name, size in sizes.items()
    }
    mixture = SourceSampler(shares, 3)
    drawn(mixture, before)
    state = json.loads(json.dumps(mixture.state()))
    expected = drawn(mixture, after)
    resumed = SourceSampler(shares, 3)
    resumed.restore(state)
    assert drawn(resumed, after) == expected


def test_weights_are_shares_of_what_is_drawn() -> None:
    shares = {"a": SourceShare(5, 3.0), "b": SourceShare(1000, 1.0), "c": SourceShare(7, 0.001)}
    found = Counter(name for name, _ in drawn(SourceSampler(shares, 0), 4000))
    assert found["a"] / 4000 == pytest.approx(0.75, abs=0.02)
    assert found["b"] / 4000 == pytest.approx(0.25, abs=0.02)


def test_a_small_source_is_gone_through_before_it_repeats() -> None:
    mixture = SourceSampler({"a": SourceShare(5, 1.0), "b": SourceShare(50, 1.0)}, 0)
    numbers = [number for name, number in drawn(mixture, 400) if name == "a"]
    rounds = [numbers[start : start + 5] for start in range(0, len(numbers) - 4, 5)]
    assert all(sorted(one) == [0, 1, 2, 3, 4] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1


@pytest.mark.parametrize("weighted", [True, False])
def test_blocks_come_from_one_source(weighted: bool) -> None:
    """16 sub-batches of 64 in a batch of 1024 are VLM2Vec's; here 4 of 8."""
    shares = {name: SourceShare(800, 1.0 if weighted else None, 8) for name in "abc"}
    names = [name for name, _ in drawn(SourceSampler(shares, 0), 800)]
    for start in range(0, 800, 8):
        assert len(set(names[start : start + 8])) == 1
    assert len(set(names)) == 3
    single = {name: SourceShare(800, 1.0, 32) for name in "abc"}  # whole batches of one source
    mixture = SourceSampler(single, 0)
    assert all(len({name for name, _ in drawn(mixture, 32)}) == 1 for _ in range(9))


def test_another_seed_is_another_order() -> None:
    shares = {"a": SourceShare(30), "b": SourceShare(30)}
    assert drawn(SourceSampler(shares, 1), 60) == drawn(SourceSampler(shares, 1), 60)
    assert drawn(SourceSampler(shares, 1), 60) != drawn(SourceSampler(shares, 2), 60)


def test_sources_without_samples_are_not_drawn() -> None:
    found = drawn(SourceSampler({"a": SourceShare(2), "b": SourceShare(0)}, 0), 4)
    assert {name for name, _ in found} == {"a"}


@given(st.lists(st.integers(1, 100), max_size=40), st.integers(1, 8))
def test_hands_hold_everything_once_and_weigh_about_the_same(sizes: list[int], world: int) -> None:
    hands = dealt(sizes, world)
    assert len(hands) == world
    assert sorted(itertools.chain(*hands)) == list(range(len(sizes)))
    counts = [len(hand) for hand in hands]
    assert max(counts) - min(counts) <= 1
    sums = [sum(sizes[index] for index in hand) for hand in hands]
    assert max(sums) - min(sums) <= 2 * max(sizes, default=0)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_batches_of_one(tmp_path: Path, world: int) -> None:
    """Each process opens its own files; together they read what one would have."""
    for name in ("long", "short"):
        rows = [
            {"query": "cat " * (index if name == "long" else 1), "positives": [f"{name} {index}"]}
            for index in range(1, 12)
        ]
        write_lines(tmp_path / f"{name}.jsonl", rows)

    def read(rank: int, world: int) -> list[list[str]]:
        sources = {n: opened(tmp_path, "pairs", f"{n}.jsonl") for n in ("long", "short")}
        shares = {"long": SourceShare(len(sources["long"]), 0.7, 2), "short": SourceShare(11, 0.3)}
        mixture = SourceSampler(shares, 4)
        batches = []
        for _ in range(5):
            samples = [sources[name][number] for name, number in mixture.batch(7)]
            sizes = [estimated_tokens(sample, 9) for sample in samples]
            batches.append([samples[index].id for index in dealt(sizes, world)[rank]])
        return batches

    alone = read(0, 1)
    together = [read(rank, world) for rank in range(world)]
    for step, batch in enumerate(alone):
        assert sorted(batch) == sorted(itertools.chain(*(one[step] for one in together)))


def test_samples_that_no_batch_held_come_first() -> None:
    mixture = SourceSampler({"a": SourceShare(3), "b": SourceShare(2)}, seed=1)
    drawn = mixture.batch(3)
    listed = list(mixture.all_samples())
    assert [one for was_drawn, one in listed if was_drawn] and len(listed) == 5
    assert {one for was_drawn, one in listed[2:]} == set(drawn)
    assert [was_drawn for was_drawn, _ in listed] == [False] * 2 + [True] * 3
    fresh = list(SourceSampler({"a": SourceShare(3), "b": SourceShare(2)}, seed=1).all_samples())
    assert [name for _, (name, _) in fresh] == ["a", "b", "a", "b", "a"]
