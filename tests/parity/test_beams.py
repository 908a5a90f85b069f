"""Beam search finds what transformers' does, token for token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.parity.decoders import BASE, ours_of, random_ids, stream
from tests.parity.peers import randomized
from visavis.generate.beam_search import BeamSearch, BeamSettings
from visavis.generate.engine import Engine, GeneratedSequence
from visavis.generate.prefix_cache import PrefixCache

pytestmark = pytest.mark.parity

SETTINGS: list[dict[str, Any]] = [
    {"num_beams": 3},
    {"num_beams": 4, "length_penalty": 2.0},
    {"num_beams": 4, "length_penalty": -1.5, "early_stopping": True},
    {"num_beams": 3, "length_penalty": 0.0, "early_stopping": "never"},
    {"num_beams": 5, "length_penalty": 0.7, "early_stopping": "never"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("stops", [(7,), (7, 20, 33)], ids=["one end", "three ends"])
@torch.no_grad()
def test_answers_are_the_peers(settings: dict[str, Any], stops: tuple[int, ...]) -> None:
    peer = LlamaForCausalLM(LlamaConfig(**BASE))
    randomized(peer)
    peer.lm_head.weight[list(stops)] *= 2.5  # ends that come now and then
    vlm, lengths = ours_of(peer), set()
    beams = BeamSettings(
        settings["num_beams"],
        settings.get("length_penalty", 1.0),
        settings.get("early_stopping", False),
    )
    for seed in range(4):
        ids = random_ids(5 + seed, seed)
        theirs = peer.generate(
            ids[None],
            attention_mask=torch.ones_like(ids)[None],
            max_new_tokens=14,
            do_sample=False,
            eos_token_id=list(stops),
            pad_token_id=0,
            **settings,
        )[0, len(ids) :].tolist()
        search = BeamSearch(beams, max_new_tokens=14, stop_ids=frozenset(stops))
        sequence = GeneratedSequence(
            stream(ids),
            int,
            14,
            frozenset(stops),
            search=search,
            token_keys=tuple(ids.tolist()),
        )
        engine = Engine(vlm, prefixes=PrefixCache())
        assert list(engine.run([sequence])) == [sequence]
        ended = [place for place, token in enumerate(theirs) if token in stops]
        assert sequence.tokens == theirs[: ended[0] if ended else None]
        assert sequence.cache is None and not engine.busy
        lengths.add(len(sequence.tokens))
    assert len(lengths) > 1
