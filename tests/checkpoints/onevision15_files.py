"""Tiny LLaVA-OneVision-1.5 folders in their own layout, and the model once more: its published code
does not load in transformers 5, so the tower is written down here from its description, by
explicit loops, dense attention and complex rotations; the language model is transformers' Qwen3.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.parity.peers import randomized
from tests.parity.qwen2_vl_files import IMAGE, VIDEO, tokenizer

PATCH, MERGE = 4, 2
VISION: dict[str, Any] = {
    "model_type": "rice_vit",
    "depth": 3,
    "embed_dim": 48,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_heads": 3,
    "hidden_act": "gelu",
    "in_channels": 3,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 1,
    "layer_norm_eps": 1e-5,
    "text_hidden_size": 32,
}
TEXT: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 1024,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
}
PROCESSOR = Qwen2VLImageProcessorPil(
    patch_size=PATCH, temporal_patch_size=1, min_pixels=256, max_pixels=1600
)


class Rice(nn.Module):
    """The vision tower and its merger."""

    def __init__(self) -> None:
        super().__init__()
        width, ffn, patch = VISION["hidden_size"], VISION["intermediate_size"], 3 * PATCH**2
        shapes = {
            "patch_embed.proj.weight": (width, 3, PATCH, PATCH),
            "class_embedding": (width,),
            "class_pos_emb": (1, width // VISION["num_heads"] // 2),
            "pre_layernorm.weight": (width,),
            "pre_layernorm.bias": (width,),
            "merger.ln_q.weight": (width,),
            "merger.ln_q.bias": (width,),
            "merger.mlp.0.weight": (width * MERGE**2, width * MERGE**2),
            "merger.mlp.0.bias": (width * MERGE**2,),
            "merger.mlp.2.weight": (VISION["text_hidden_size"], width * MERGE**2),
            "merger.mlp.2.bias": (VISION["text_hidden_size"],),
        }
        assert patch == math.prod(shapes["patch_embed.proj.weight"][1:])
        for number in range(VISION["depth"]):
            block = f"blocks.{number}"
            for norm in ("norm1", "norm2"):
                shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
            for name, rows, columns in (
                ("attn.qkv", 3 * width, width),
                ("attn.proj", width, width),
                ("mlp.fc1", ffn, width),
                ("mlp.fc2", width, ffn),
            ):
                shapes[f"{block}.{name}.weight"] = (rows, columns)
                shapes[f"{block}.{name}.bias"] = (rows,)
        for name, shape in shapes.items():
            self.register_parameter(name.replace(".", "/"), nn.Parameter(torch.zeros(shape)))

    def tensors(self) -> dict[str, Tensor]:
        return {name.replace("/", "."): t.detach() for name, t in self.named_parameters()}

    def norm(self, x: Tensor, name: str) -> Tensor:
        w = self.tensors()
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + VISION["layer_norm_eps"]).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        w = self.tensors()
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def frame(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """Return the tokens of one image or frame, [rows * columns / merge², D]."""
        w, heads = self.tensors(), VISION["num_heads"]
        size = VISION["hidden_size"] // heads
        frequencies = 10000.0 ** (-torch.arange(size // 4) / (size // 4))
        angles = [w["class_pos_emb"][0]]
        for row in range(0, rows, MERGE):
            for column in range(0, columns, MERGE):
                for y in range(row, row + MERGE):
                    angles += [
                        torch.cat((y * frequencies, x * frequencies))
                        for x in range(column, column + MERGE)
                    ]
        turns = torch.polar(torch.ones(len(angles), size // 2), torch.stack(angles))
        x = patches @ w["patch_embed.proj.weight"].flatten(1).T
        x = self.norm(torch.cat((w["class_embedding"][None], x)), "pre_layernorm")
        for number in range(VISION["depth"]):
            block = f"blocks.{number}"
            qkv = self.linear(self.norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
            q, k, v = qkv.view(len(x), 3, heads, size).unbind(1)
            mixed = []
            for head in range(heads):
                turned = []
                for part in (q[:, head], k[:, head]):
                    first, second = part.chunk(2, -1)
                    product = torch.complex(first, second) * turns
                    turned.append(torch.cat((product.real, product.imag), -1))
                scores = (turned[0] @ turned[1].T / size**0.5).softmax(-1)
                mixed.append(scores @ v[:, head])
            x = x + self.linear(torch.cat(mixed, -1), f"{block}.attn.proj")
            hidden = self.linear(self.norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
            x = x + self.linear(nn.functional.gelu(hidden), f"{block}.mlp.fc2")
        folded = self.norm(x[1:], "merger.ln_q").reshape(rows * columns // MERGE**2, -1)
        hidden = nn.functional.gelu(self.linear(folded, "merger.mlp.0"))
        return self.linear(hidden, "merger.mlp.2")


class Peer:
    """The whole model."""

    def __init__(self, tied: bool = False, seed: int = 0) -> None:
        self.language_model = Qwen3ForCausalLM(Qwen3Config(**TEXT, tie_word_embeddings=tied))
        self.rice = Rice()
        randomized(self.language_model, seed)
        randomized(self.rice, seed + 1)
        if tied:
            self.language_model.tie_weights()

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by their names on the hub."""
        text = self.language_model.state_dict()
        if self.language_model.config.tie_word_embeddings:
            text.pop("lm_head.weight")
        visual = {f"visual.{name}": tensor for name, tensor in self.rice.tensors().items()}
        return {name: tensor.clone() for name, tensor in {**text, **visual}.items()}

    def inputs(self, content: list[Any], *, plain: bool = False) -> tuple[list[int], Tensor]:
        """Return ids and input embeddings of images, texts and lists of frames of one user.

        Args:
            plain: without chat template.
        """
        words = tokenizer()
        parts = [
            {"type": "text", "text": one}
            if isinstance(one, str)
            else {"type": "video" if isinstance(one, list) else "image"}
            for one in content
        ]
        text = words.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
        )
        if plain:
            text = "".join(one if isinstance(one, str) else "<|image_pad|>" for one in content)
        ids: list[int] = []
        seen: list[Tensor] = []
        waiting = iter([one for one in content if not isinstance(one, str)])
        for number in words(text)["input_ids"]:
            if number not in (IMAGE, VIDEO):
                ids.append(number)
                continue
            visual = next(waiting)
            tokens = self.see(visual if isinstance(visual, list) else [visual])
            ids += [number] * len(tokens)
            seen.append(tokens)
        embeddings = self.language_model.get_input_embeddings()(torch.tensor(ids))
        if seen:
            places = [at for at, one in enumerate(ids) if one in (IMAGE, VIDEO)]
            embeddings = embeddings.index_copy(0, torch.tensor(places), torch.cat(seen))
        return ids, embeddings

    def see(self, frames: list[Image.Image]) -> Tensor:
        """Return the tokens of an image, or of frames one after another."""
        found = []
        for frame in frames:
            inputs = PROCESSOR(images=[frame], return_tensors="pt")
            _, rows, columns = inputs["image_grid_thw"][0].tolist()
            found.append(self.rice.frame(inputs["pixel_values"], rows, columns))
        return torch.cat(found)


def save_onevision15(folder: Path, *, tied: bool = False) -> Peer:
    """Write a model with its tokenizer, chat template and image processor; return the peer."""
    peer = Peer(tied)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LLaVAOneVision1_5_ForConditionalGeneration"],
        "auto_map": {"AutoConfig": "configuration_llavaonevision1_5.Llavaonevision1_5Config"},
        "model_type": "llavaonevision1_5",
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "tie_word_embeddings": tied,
        "text_config": {**TEXT, "model_type": "LLaVAOneVision1_5_text", "rope_scaling": None},
        "vision_config": VISION,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(peer.tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return peer
