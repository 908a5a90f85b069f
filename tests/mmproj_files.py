"""Tiny LLaVAs of our own making, for tests of GGUF: random towers on a random Llama."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.parity.peers import randomized
from tests.parity.test_gguf_families import build_peer, write
from visavis.checkpoints.checkpoint import Checkpoint
from visavis.checkpoints.gguf.reader import open_gguf
from visavis.checkpoints.gguf.writer import NewTensor, write_file
from visavis.checkpoints.load import load_checkpoint
from visavis.model.config import ConnectorConfig, ViTConfig
from visavis.model.vlm import VLM
from visavis.processing.config import ImageProcessorConfig
from visavis.processing.prompt_config import PromptConfig

SIZE = 32
SIGLIP = ViTConfig(SIZE, 8, 32, 2, 2, 64, "gelu_tanh", 2.0**-20, class_token=False, patch_bias=True)
CLIP = ViTConfig(SIZE, 8, 32, 3, 2, 64, "quick_gelu", 2.0**-17, pre_norm=True)
DINO = ViTConfig(SIZE, 8, 32, 3, 2, 64, "gelu", 2.0**-20, patch_bias=True, layer_scale=True)
MLP: dict[str, Any] = {"kind": "mlp", "depth": 2}
VARIANTS: dict[str, tuple[ViTConfig, dict[str, Any]]] = {
    "SigLIP, mlp2x": (SIGLIP, MLP),
    "SigLIP, linear": (SIGLIP, {"kind": "linear"}),
    "SigLIP, mlp of another width": (SIGLIP, MLP | {"hidden_width": 96}),
    "CLIP, mlp2x": (CLIP, MLP),
    "CLIP, linear": (CLIP, {"kind": "linear"}),
    "CLIP of exact GELU": (replace(CLIP, activation="gelu"), MLP),
    "DINOv2": (DINO, MLP),
    "DINOv2-giant": (replace(DINO, activation="silu", gated_ffn=True), MLP),
}


def tiny_llama(folder: Path) -> Checkpoint:
    """Return a language model with a tokenizer of letters and words."""
    path = folder / "llama.gguf"
    peer = build_peer("llama", intermediate_size=64, max_position_embeddings=512)
    write(path, "llama", peer)
    return load_checkpoint(path, precision="f32", device="cpu")


def compose(base: Checkpoint, name: str, **settings: Any) -> Checkpoint:
    """Return the language model with a random tower and connector."""
    tower, connector = VARIANTS[name]
    config = replace(
        base.vlm.config,
        tower=tower,
        connector=ConnectorConfig(
            in_width=tower.width, out_width=base.vlm.config.decoder.width, **connector
        ),
        image_token_id=0,
        select_layer=-2 if tower.class_token else -1,
    )
    vlm = VLM(replace(config, **settings))
    randomized(vlm)
    vlm.decoder.load_state_dict(base.vlm.decoder.state_dict())
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return replace(
        base,
        vlm=vlm.requires_grad_(False),
        processor=ImageProcessorConfig(SIZE, "pad", mean, std),
        profile=PromptConfig(chat_template="qwen_1_5"),
    )


def rewrite(path: Path, out: Path, changes: dict[str, Any], names: dict[str, str]) -> Path:
    """Write a file again with other metadata (None: without) and tensor names."""
    file = open_gguf(path)
    metadata = {k: v for k, v in (file.metadata | changes).items() if v is not None}
    tensors = [
        NewTensor(names.get(name, name), info.shape, info.type, lambda name=name: [file.raw(name)])
        for name, info in file.tensors.items()
    ]
    write_file(out, metadata, tensors)
    return out
