"""What parity tests of language models share: tiny configs, packed streams, and the comparison.

`assert_same_model` runs a peer and ours over hidden states, logits, a packed batch of mixed
lengths and decoding with a cache. Knows no family.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.parity.peers import assert_close
from visavis.checkpoints.transformers.vision_models import vlm_config
from visavis.checkpoints.transformers.weights import read
from visavis.model.attention import SequenceLayout
from visavis.model.batch import PackedBatch
from visavis.model.kv_cache import KVCache
from visavis.model.vlm import VLM

BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def ours_of(peer: PreTrainedModel) -> VLM:
    """Return our model with the peer's weights."""
    config = peer.config.to_dict()
    vlm = VLM(vlm_config(config))
    vlm.load_state_dict(read(config, peer.state_dict(), where="the peer"))
    return vlm.eval()


def stream(*sequences: Tensor) -> PackedBatch:
    return PackedBatch(
        token_ids=torch.cat(sequences),
        positions=torch.cat([torch.arange(len(ids)) for ids in sequences]),
        lengths=tuple(len(ids) for ids in sequences),
    )


def random_ids(length: int, seed: int = 1) -> Tensor:
    return torch.randint(64, (length,), generator=torch.Generator().manual_seed(seed))


def assert_same_hidden_states(peer: PreTrainedModel, vlm: VLM, length: int = 60) -> None:
    ids = random_ids(length)
    theirs = peer(ids[None], output_hidden_states=True)
    num_layers = vlm.config.decoder.num_layers
    assert len(theirs.hidden_states) == num_layers + 1
    ours = vlm(stream(ids), layers=range(num_layers + 1))
    for layer, hidden in enumerate(theirs.hidden_states):
        assert_close(ours[layer], hidden[0], f"hidden state {layer}")
    assert_close(vlm.decoder.logits(ours[num_layers]), theirs.logits[0], "logits")


def assert_packed_equals_singles(peer: PreTrainedModel, vlm: VLM) -> None:
    lengths = [1, 37, 5, 20]
    sequences = [random_ids(length, seed=length) for length in lengths]
    ours = vlm.decoder.logits(vlm(stream(*sequences))[-1]).split(lengths)
    for logits, ids in zip(ours, sequences, strict=True):
        assert_close(logits, peer(ids[None]).logits[0], f"{len(ids)} tokens of a packed batch")


def assert_cached_equals_whole(peer: PreTrainedModel, vlm: VLM) -> None:
    ids = random_ids(60)
    cache = KVCache(vlm.config.decoder, dtype=torch.float32, capacity=8)
    pieces = []
    for chunk in ids.split([40, 1, 1, 7, 1, 10]):
        positions = torch.arange(cache.length, cache.length + len(chunk))
        x = vlm.decoder.embed_tokens(chunk)
        pieces.append(vlm.decoder(x, positions, SequenceLayout((len(chunk),), (cache,)))[-1])
    assert_close(vlm.decoder.logits(torch.cat(pieces)), peer(ids[None]).logits[0], "cached logits")
