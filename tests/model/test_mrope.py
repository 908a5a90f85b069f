"""Positions on three axes, against the rule as published and as transformers counts them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from visavis.model.image_input import ImageGrid
from visavis.model.rope import mrope_positions


def rows(found: Tensor) -> list[list[int]]:
    return found.tolist()


def test_the_example_of_the_docstring() -> None:
    found = mrope_positions(11, [(3, 6)], [ImageGrid(1, 4, 6)])
    assert rows(found) == [
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7],
        [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7],
        [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7],
    ]


def test_a_video_continues_after_its_largest_position() -> None:
    """Three temporal patches of 1 x 2 tokens: the next text stands at 3, not at 2."""
    found = mrope_positions(8, [(0, 6)], [ImageGrid(3, 2, 4, video=True)])
    assert rows(found) == [
        [0, 0, 1, 1, 2, 2, 3, 4],
        [0, 0, 0, 0, 0, 0, 3, 4],
        [0, 1, 0, 1, 0, 1, 3, 4],
    ]


def test_text_alone_and_neighbours() -> None:
    assert rows(mrope_positions(3, [], [])) == [[0, 1, 2]] * 3
    found = mrope_positions(3, [(0, 1), (1, 2)], [ImageGrid(1, 2, 2), ImageGrid(1, 2, 4)])
    assert rows(found) == [[0, 1, 1], [0, 1, 1], [0, 1, 2]]
    with pytest.raises(AssertionError, match="has 4 tokens, its slot 3"):
        mrope_positions(5, [(1, 3)], [ImageGrid(1, 4, 4)])


def test_mixed_sequences_equal_transformers() -> None:
    """While no video has more temporal patches than tokens along its longer side: transformers
    5 forgets the time axis when it counts on, its first release and the paper do not."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    sizes |= {"intermediate_size": 8, "vocab_size": 16, "num_key_value_heads": 1}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2}
    with torch.device("meta"):
        config = Qwen2VLConfig(text_config=sizes, vision_config=vision)
        peer = Qwen2VLForConditionalGeneration(config).model
    grids = [(1, 4, 6), (2, 6, 4), (1, 2, 2), (3, 6, 8)]
    kinds = [1, 2, 1, 2]
    types, slots = [0] * 5, []
    for (time, height, width), kind in zip(grids, kinds, strict=True):
        count = time * height * width // 4
        slots.append((len(types), count))
        types += [kind] * count + [0] * 3
    grid = {kind: [g for g, k in zip(grids, kinds, strict=True) if k == kind] for kind in (1, 2)}
    theirs, ahead = peer.get_rope_index(
        torch.zeros(1, len(types), dtype=torch.int64),
        mm_token_type_ids=torch.tensor([types]),
        image_grid_thw=torch.tensor(grid[1]),
        video_grid_thw=torch.tensor(grid[2]),
    )
    ours = mrope_positions(len(types), slots, [ImageGrid(*g) for g in grids])
    assert torch.equal(ours, theirs[:, 0])
    assert int(ours.max()) + 1 == len(types) + int(ahead)
