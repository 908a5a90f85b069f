"""The text tower against transformers' BERT and, with nano's weights, sentence-transformers'
pooling: the same token ids, the same vectors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.parity.peers import assert_close, randomized
from visavis.checkpoints.bert import MINILM, load_bert
from visavis.checkpoints.load import NANO_FOLDER
from visavis.errors import CheckpointError
from visavis.model.config import BertConfig
from visavis.model.text_tower import BertEncoder
from visavis.processing.prompt_encoder import plain_specials
from visavis.processing.tokenizer import encode
from visavis.processing.tokenizer_check import read_tokenizer

pytestmark = pytest.mark.parity

SMALL = BertConfig(50, 24, 2, 3, 40, 16, 16, 1, 2)
TEXTS = (
    "a cat",
    "Naïve café: 日本語, and [SEP] in a text!",
    "old coins on a wooden table, seen from above " * 3,
)


def tower_of(path: Path, config: BertConfig) -> BertEncoder:
    tower = BertEncoder(config)
    tower.load_state_dict(load_bert(path, config))
    return tower.eval()


def write_peer(path: Path) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=SMALL.vocab_size,
        hidden_size=SMALL.width,
        num_hidden_layers=SMALL.num_layers,
        num_attention_heads=SMALL.num_heads,
        intermediate_size=SMALL.ffn_width,
        max_position_embeddings=SMALL.context_length,
        layer_norm_eps=SMALL.norm_eps,
    )
    peer = randomized(transformers.BertModel(config, add_pooling_layer=False)).eval()
    save_file({name: tensor.contiguous() for name, tensor in peer.state_dict().items()}, path)
    return peer


@torch.no_grad()
def test_vectors_are_those_of_transformers(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    peer, tower = write_peer(path), tower_of(path, SMALL)
    texts = [torch.arange(3, 10), torch.tensor([40]), torch.arange(20, 34)]
    theirs = []
    for text in texts:
        ids = torch.cat((torch.tensor([1]), text, torch.tensor([2])))
        theirs.append(peer(ids[None]).last_hidden_state[0].mean(0))
    expected = torch.nn.functional.normalize(torch.stack(theirs), dim=-1)
    ours = tower(torch.cat(texts), [len(text) for text in texts])
    assert_close(ours, expected, "vectors")
    assert_close(tower(texts[1], [1]), ours[1:2], "one text alone")


@torch.no_grad()
def test_long_texts_are_read_in_windows(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_peer(path)
    whole, windowed = tower_of(path, SMALL), tower_of(path, replace(SMALL, window=8))
    ids = torch.arange(3, 15)  # 12 tokens: two windows of 6
    halves = [windowed(part, [6]) for part in ids.split(6)]
    lengths = torch.ones(2, 1)
    assert windowed(ids, [12]).shape == (1, SMALL.width)
    assert not torch.allclose(windowed(ids, [12]), whole(ids, [12]), atol=1e-3)
    direction = torch.nn.functional.normalize(sum(halves) * lengths[:1], dim=-1)
    assert (windowed(ids, [12]) * direction).sum() > 0.99


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_peer(path)
    with pytest.raises(CheckpointError, match="does not hold the expected BERT weights"):
        load_bert(path, replace(SMALL, ffn_width=41))
    save_file({"embeddings.LayerNorm.weight": torch.ones(24)}, path)
    with pytest.raises(CheckpointError, match=r"word_embeddings\.weight"):
        load_bert(path, SMALL)


@torch.no_grad()
def test_nano_reads_texts_as_sentence_transformers_does(
    nano_files: dict[str, Path], tmp_path: Path
) -> None:
    models = pytest.importorskip("sentence_transformers.models")
    transformers = pytest.importorskip("transformers")
    transformers.BertConfig(
        vocab_size=MINILM.vocab_size,
        hidden_size=MINILM.width,
        num_hidden_layers=MINILM.num_layers,
        num_attention_heads=MINILM.num_heads,
        intermediate_size=MINILM.ffn_width,
    ).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").symlink_to(nano_files["text_tower"])
    (tmp_path / "tokenizer.json").symlink_to(NANO_FOLDER / "text_tokenizer.json")
    peer = transformers.BertModel.from_pretrained(tmp_path, add_pooling_layer=False)
    words = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    pooling = models.Pooling(MINILM.width, pooling_mode="mean")
    tokenizer = read_tokenizer(NANO_FOLDER / "text_tokenizer.json")
    tower = tower_of(nano_files["text_tower"], MINILM).float()
    for text in TEXTS:
        ids = encode(tokenizer, plain_specials(tokenizer), text, parse_special=False)
        if "[SEP]" not in text:
            theirs = words(text, add_special_tokens=False)["input_ids"]
            assert ids == theirs
        whole = torch.tensor([[MINILM.cls_id, *ids, MINILM.sep_id]])
        mask = torch.ones_like(whole)
        hidden = peer(whole, attention_mask=mask).last_hidden_state
        pooled = pooling({"token_embeddings": hidden, "attention_mask": mask})
        expected = torch.nn.functional.normalize(pooled["sentence_embedding"], dim=-1)
        assert_close(tower(torch.tensor(ids), [len(ids)]), expected, text)
