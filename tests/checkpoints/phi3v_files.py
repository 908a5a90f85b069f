"""Tiny folders of Phi-3.5-vision, whose model no library has, and a plain model to compare with.

The peer is a stock Phi-3 with the published embedder hung below it under its published names, so
that PEFT adapts and names its parts as it does those of the real one. What the embedder computes is
written out from the published formulas.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, processors
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, Phi3Config, Phi3ForCausalLM

from tests.checkpoints.transformers_files import TEXT, VISION
from tests.fakes import byte_tokenizer
from tests.parity.peers import randomized
from visavis.checkpoints.llava.config import KNOWN_TOWERS

SIDE = VISION["image_size"]
GRID = SIDE // VISION["patch_size"]
TOWER = "tiny/clip"
SETTINGS: dict[str, Any] = {
    "architectures": ["Phi3VForCausalLM"],
    "model_type": "phi3_v",
    "embd_layer": {
        "embedding_cls": "image",
        "hd_transform_order": "sub_glb",
        "projection_cls": "mlp",
        "use_hd_transform": True,
        "with_learnable_separator": True,
    },
    "img_processor": {
        "image_dim_out": VISION["hidden_size"],
        "model_name": TOWER,
        "name": "clip_vision_model",
        "num_img_tokens": 144,
    },
    "vocab_size": 272,
    "hidden_size": TEXT["hidden_size"],
    "intermediate_size": TEXT["intermediate_size"],
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "su",
        "short_factor": [1.0, 1.25, 1.5, 2.0],
        "long_factor": [2.0, 4.0, 6.0, 8.0],
    },
    "sliding_window": 262144,
    "tie_word_embeddings": False,
}


@pytest.fixture(autouse=True)
def tiny_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout names its tower and does not describe it: make a tiny one known."""
    vision = {"model_type": "clip_vision_model", **VISION}
    clip = KNOWN_TOWERS["openai/clip-vit-large-patch14-336"][1]
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    monkeypatch.setitem(KNOWN_TOWERS, TOWER, (vision, {**clip, **size}))


class Embedder(nn.Module):
    """What turns a picture's views into tokens, by the published names of its parts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        folded = 4 * VISION["hidden_size"]
        self.img_processor = nn.ModuleDict(
            {"vision_model": CLIPVisionModel(CLIPVisionConfig(**VISION))}
        )
        self.img_projection = nn.Sequential(
            nn.Linear(folded, width), nn.GELU(), nn.Linear(width, width)
        )
        self.sub_GN = nn.Parameter(torch.randn(1, 1, 1, folded))
        self.glb_GN = nn.Parameter(torch.randn(1, 1, folded))

    def forward(self, views: Tensor, rows: int, columns: int) -> Tensor:
        """Return image tokens [n, D] of a base view and tiles [V, 3, S, S]."""
        tower: Any = self.img_processor["vision_model"]
        x = tower.pre_layrnorm(tower.embeddings(views))
        for layer in tower.encoder.layers[:-1]:  # asked for hidden states, it would repeat some
            x = layer(x, attention_mask=None)
        features = x[:, 1:]
        base = self.lines([[features[0]]])
        tiles = features[1:].unflatten(0, (rows, columns))
        return self.img_projection(torch.cat((self.lines(tiles), self.glb_GN[0], base)))

    def lines(self, tiles: Any) -> Tensor:
        """Lay tiles in order, four neighbours as one token, a separator after each line."""
        run = []
        for row in tiles:
            images = [tile.view(GRID, GRID, -1) for tile in row]
            for y in range(0, GRID, 2):
                for image in images:
                    for x in range(0, GRID, 2):
                        square = (
                            image[y, x],
                            image[y, x + 1],
                            image[y + 1, x],
                            image[y + 1, x + 1],
                        )
                        run.append(torch.cat(square))
                run.append(self.sub_GN.flatten())
        return torch.stack(run)


def tokenizer() -> Tokenizer:
    """A token a byte, Phi-3's special tokens, and <s> in front of whatever is encoded."""
    made = byte_tokenizer()
    texts = ("<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
    made.add_special_tokens([AddedToken(text, special=True) for text in texts])
    bos = ("<s>", made.token_to_id("<s>"))
    made.post_processor = processors.TemplateProcessing(
        single=[bos[0], "$A"], pair=[bos[0], "$A", "$B"], special_tokens=[bos]
    )
    return made


def tiny_peer() -> Phi3ForCausalLM:
    rope = dict(SETTINGS["rope_scaling"]) | {"rope_type": "longrope", "rope_theta": 10000.0}
    del rope["type"]
    known = {k: v for k, v in SETTINGS.items() if k in Phi3Config().to_dict()}
    text = known | {"model_type": "phi3", "rope_parameters": rope}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    peer = Phi3ForCausalLM(Phi3Config(**text | special))
    peer.model.vision_embed_tokens = Embedder(TEXT["hidden_size"])
    randomized(peer)
    with torch.no_grad():  # not scaled by their shapes, like matrices
        for mark in (peer.model.vision_embed_tokens.sub_GN, peer.model.vision_embed_tokens.glb_GN):
            mark.copy_(torch.randn(mark.shape, generator=torch.Generator().manual_seed(mark.dim())))
    return peer


def save_phi3v(folder: Path, num_crops: int = 4, **settings: Any) -> Phi3ForCausalLM:
    """Write a folder as published; return the peer."""
    folder.mkdir(parents=True, exist_ok=True)
    peer = tiny_peer()
    tensors = {name: tensor.clone() for name, tensor in peer.state_dict().items()}
    tensors["model.vision_embed_tokens.wte.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    tokenizer().save(str(folder / "tokenizer.json"))
    files = {
        "config.json": SETTINGS | settings,
        "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "<|endoftext|>"},
        "preprocessor_config.json": {
            "image_processor_type": "Phi3VImageProcessor",
            "num_crops": num_crops,
            "num_img_tokens": 144,
        },
    }
    for name, data in files.items():
        (folder / name).write_text(json.dumps(data), encoding="utf-8")
    return peer


def published_inputs(
    peer: Phi3ForCausalLM, text: str, pictures: list[tuple[Tensor, int, int]]
) -> tuple[list[int], Tensor]:
    """Return ids (0 for images) and embeddings [1, T, D] of a text with <|image_1|>, ….

    Args:
        pictures: views, rows and columns of each.
    """
    chunks = [tokenizer().encode(chunk).ids for chunk in re.split(r"<\|image_\d+\|>", text)]
    ids: list[int] = list(chunks[0])
    body: Any = peer.model
    parts = [body.embed_tokens(torch.tensor(chunks[0]))]
    for (views, rows, columns), chunk in zip(pictures, chunks[1:], strict=True):
        tokens = body.vision_embed_tokens(views, rows, columns)
        parts += [tokens, body.embed_tokens(torch.tensor(chunk))]
        ids += [0] * len(tokens) + chunk
    return ids, torch.cat(parts)[None]
