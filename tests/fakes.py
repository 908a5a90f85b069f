"""Tiny random checkpoints that load and run in milliseconds, through the same code as real ones.

Their answers are noise, but they are a real tower, connector, decoder, head and tokenizer: nothing
is mocked. Knows no test.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from visavis.api import Model, load
from visavis.checkpoints.native import save_native
from visavis.model.config import ConnectorConfig, DecoderConfig, HeadConfig, ViTConfig, VLMConfig
from visavis.model.vlm import VLM
from visavis.processing.config import ImageProcessorConfig
from visavis.processing.prompt_config import PromptConfig

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")


def byte_tokenizer() -> Tokenizer:
    """One token per byte, and ChatML's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    return tokenizer


def tiny_config(context_length: int = 512) -> VLMConfig:
    """A vision-language model of some twenty thousand parameters; 4 tokens per picture."""
    tokenizer = byte_tokenizer()
    return VLMConfig(
        decoder=DecoderConfig(
            vocab_size=tokenizer.get_vocab_size(),
            width=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            ffn_width=48,
            context_length=context_length,
        ),
        tower=ViTConfig(
            image_size=32,
            patch_size=8,
            width=24,
            num_layers=1,
            num_heads=2,
            ffn_width=32,
            activation="gelu",
            norm_eps=1e-6,
        ),
        connector=ConnectorConfig("mlp", in_width=24, out_width=32, depth=2, shuffle=2),
        head=HeadConfig(layers=(0, 1), dim=16),
        image_token_id=tokenizer.token_to_id("<image>"),
    )


def write_tiny_checkpoint(
    folder: Path, *, name: str = "tiny", seed: int = 0, config: VLMConfig | None = None
) -> Path:
    """Write a folder that `visavis.load` reads; another seed is another model."""
    torch.manual_seed(seed)
    config = config or tiny_config()
    vlm = VLM(config)
    for parameter in vlm.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_native(
        folder,
        name=name,
        config=config,
        tensors=vlm.state_dict(),
        profile=PromptConfig(chat_template="chatml-bare", pooling="head"),
        processor=ImageProcessorConfig(32, "squash", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    )
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    settings = '{"eos_token": "<|im_end|>", "bos_token": null, "add_bos_token": false}'
    (folder / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    return folder


def write_tiny_multi_vector_checkpoint(folder: Path) -> Path:
    """Write a folder of a model that gives a vector per token, 16 numbers each."""
    config = replace(tiny_config(), head=None, multi_vector_dim=16)
    write_tiny_checkpoint(folder, name="tiny-multi", config=config)
    profile = PromptConfig(
        text_form="Query: {text}<|endoftext|><|endoftext|>\n",
        visual_form="{visual}<|im_start|>Describe the image.",
        document_form="{text}",
        pooling="multi",
    )
    path = folder / "visavis.json"
    data = json.loads(path.read_text(encoding="utf-8")) | {"profile": profile.to_dict()}
    path.write_text(json.dumps(data), encoding="utf-8")
    return folder


@cache
def tiny_multi_vector_model() -> Model:
    """Return one shared tiny multi-vector model; tests must not change it."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny_multi_vector_checkpoint(Path(folder))
        return load(path, precision="f32", device="cpu")


@cache
def tiny_model(seed: int = 0) -> Model:
    """Return one shared tiny model per seed; tests must not change it."""
    with tempfile.TemporaryDirectory() as folder:
        return load(write_tiny_checkpoint(Path(folder), seed=seed), precision="f32", device="cpu")


def picture(seed: int, size: tuple[int, int] = (48, 36)) -> Image.Image:
    """Return a picture of large random blocks, different for every seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


def write_pictures(folder: Path, number: int, *, first_seed: int = 0) -> list[Path]:
    """Write `picture-000.png` and so on; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"picture-{first_seed + i:03d}.png" for i in range(number)]
    for i, path in enumerate(paths):
        picture(first_seed + i).save(path)
    return paths
