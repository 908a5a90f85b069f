"""`tiny-random`: a whole model of some 660,000 random numbers, to try recipes with in seconds.

A ViT, an MLP, a Llama, and a tokenizer of bytes and a few words. Says nothing until it is trained.
Written to the cache when it is first asked for, from a seed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from visavis.checkpoints import bundled
from visavis.checkpoints.checkpoint import write_words
from visavis.checkpoints.native import save_native
from visavis.model.config import ConnectorConfig, DecoderConfig, ViTConfig, VLMConfig
from visavis.model.vision.vit import ViT
from visavis.model.vlm import VLM
from visavis.processing.config import ImageProcessorConfig
from visavis.processing.prompt_config import PromptConfig
from visavis.processing.tokenizer import SpecialTokens
from visavis.utils import write_folder_atomically

NAME = "tiny-random"
VERSION = 3  # of its files
SEED = 2  # of its weights
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
WORDS = (  # each is one token, with the blank before it; all else is read byte by byte
    "user assistant system You are a helpful assistant. A chat between curious user and an"
    " artificial intelligence gives detailed, polite answers to the user's questions."
    " USER: ASSISTANT: What is on the left right? Which colour shape Describe picture. Find"
    " Represent given image with question: a red green blue yellow purple black circle square"
    " triangle cross ring left of"
)
PAPER, INK = (0.8, 0.8, 0.8), (0.25, 0.25, 0.25)  # mean and deviation of drawings' pixels
PATCH_STD, POSITION_STD, WORD_STD = 0.15, 0.1, 0.1


def fetch() -> Path:
    """Return the model's folder, making it if it is not in the cache."""
    folder = bundled.cache_dir() / f"{NAME}-{VERSION}"
    if not folder.is_dir():
        with write_folder_atomically(folder) as temporary:
            write(temporary)
    return folder


def write(folder: Path) -> None:
    """Write the model as a folder that stands alone."""
    tokenizer = words_tokenizer()
    end_of_text, _, end, image = (tokenizer.token_to_id(text) for text in SPECIALS)
    assert end_of_text is not None and end is not None and image is not None
    tower = ViTConfig(
        image_size=64,
        patch_size=8,
        width=96,
        num_layers=2,
        num_heads=4,
        ffn_width=192,
        activation="gelu",
        norm_eps=1e-6,
        class_token=False,
        patch_bias=True,
    )
    decoder = DecoderConfig(
        vocab_size=tokenizer.get_vocab_size(),
        width=96,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=24,
        ffn_width=256,
        context_length=1024,
    )
    config = VLMConfig(
        decoder=decoder,
        tower=tower,
        connector=ConnectorConfig("mlp", tower.width, decoder.width, depth=2, shuffle=2),
        image_token_id=image,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        vlm = VLM(config)
        nn.init.normal_(vlm.decoder.embed.weight, std=WORD_STD)
        assert isinstance(vlm.tower, ViT)
        nn.init.normal_(vlm.tower.patch.weight, std=PATCH_STD)
        nn.init.normal_(vlm.tower.positions, std=POSITION_STD)
    save_native(
        folder,
        name=NAME,
        config=config,
        tensors=vlm.state_dict(),
        profile=PromptConfig(chat_template="chatml-bare", embed_suffix="<|im_end|>"),
        processor=ImageProcessorConfig(tower.image_size, "squash", PAPER, INK),
    )
    specials = SpecialTokens(None, end, (end,), end_of_text, False)
    write_words(folder, tokenizer, specials, context_length=decoder.context_length)


def words_tokenizer() -> Tokenizer:
    """Return a tokenizer of bytes, the words of `WORDS` and ChatML's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator([WORDS], trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    return tokenizer
