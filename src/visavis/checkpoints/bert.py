"""BERT weights in transformers' names, and the tokenizer beside them.

The token-type embedding of the first segment is added to the positions: every text is one segment.
Does not know where the files come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from visavis.checkpoints.tensor_files import read_tensors
from visavis.errors import CheckpointError
from visavis.model.config import BertConfig

# all-MiniLM-L6-v2; `window` is sentence-transformers' max_seq_length for it
MINILM = BertConfig(
    vocab_size=30522,
    width=384,
    num_layers=6,
    num_heads=12,
    ffn_width=1536,
    context_length=512,
    window=256,
    cls_id=101,
    sep_id=102,
)
PARTS = {  # ours: theirs, below encoder.layer.N
    "out": "attention.output.dense",
    "attn_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "ffn_norm": "output.LayerNorm",
}


def load_bert(path: Path, config: BertConfig = MINILM) -> dict[str, Tensor]:
    """Return the state for `BertEncoder(config)`, float32.

    Raises:
        CheckpointError: the file is damaged, or holds tensors of another model.
    """
    entries = read_tensors([path]).entries
    found = {name.removeprefix("bert."): tensor for name, tensor in entries.items()}
    width, tables = config.width, "embeddings"
    wanted: dict[str, tuple[int, ...]] = {
        f"{tables}.word_embeddings.weight": (config.vocab_size, width),
        f"{tables}.position_embeddings.weight": (config.context_length, width),
        f"{tables}.token_type_embeddings.weight": (2, width),
        f"{tables}.LayerNorm.weight": (width,),
    }
    for number in range(config.num_layers):
        layer = f"encoder.layer.{number}"
        wanted[f"{layer}.intermediate.dense.weight"] = (config.ffn_width, width)
    wrong = [n for n, s in wanted.items() if n not in found or tuple(found[n].shape) != s]
    if wrong:
        raise CheckpointError(
            f"{path} does not hold the expected BERT weights: {', '.join(wrong[:3])} are missing "
            "or of another shape. It belongs to another model; fetch it again."
        )
    try:
        return _state({name: tensor.read().float() for name, tensor in found.items()}, config)
    except KeyError as error:
        raise CheckpointError(
            f"{path} lacks {error}, which a BERT encoder has; the file is incomplete, fetch it "
            "again."
        ) from error


def _state(found: Mapping[str, Tensor], config: BertConfig) -> dict[str, Tensor]:
    tables = "embeddings"
    segment = found[f"{tables}.token_type_embeddings.weight"][0]
    state = {
        "embed.weight": found[f"{tables}.word_embeddings.weight"],
        "positions": found[f"{tables}.position_embeddings.weight"] + segment,
    }
    for kind in ("weight", "bias"):
        state[f"norm.{kind}"] = found[f"{tables}.LayerNorm.{kind}"]
        for number in range(config.num_layers):
            ours, theirs = f"blocks.{number}", f"encoder.layer.{number}"
            own = [found[f"{theirs}.attention.self.{n}.{kind}"] for n in ("query", "key", "value")]
            state[f"{ours}.qkv.{kind}"] = torch.cat(own)
            for name, other in PARTS.items():
                state[f"{ours}.{name}.{kind}"] = found[f"{theirs}.{other}.{kind}"]
    return state
