"""Tiny folders of CLIP, SigLIP, SigLIP 2 and MetaCLIP 2, written by transformers itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    MetaClip2Config,
    MetaClip2Model,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2Model,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipModel,
    SiglipTokenizer,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from tests.parity.peers import randomized

SIZE, PATCH, MAX_PATCHES = 32, 8, 24
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": SIZE,
    "patch_size": PATCH,
}
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
}
KINDS = ("clip", "old clip", "metaclip 2", "siglip", "siglip spiece", "siglip 2", "naflex")
CORPUS = ["a photo of a cat", "two dogs run over a green field", "What is it? It's a bird!"] * 20


@dataclass
class Peer:
    """The same model and processors in transformers."""

    model: PreTrainedModel
    tokenizer: Any
    image_processor: Any

    @property
    def pads(self) -> bool:
        return "siglip" in self.model.config.model_type

    def ids(self, texts: list[str]) -> Tensor:
        """Return the ids that the peer is fed, padded."""
        padding = "max_length" if self.pads else True
        found = self.tokenizer(texts, padding=padding, return_tensors="pt", max_length=48)
        ids: Tensor = found["input_ids"]
        return ids

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        found = self.model.get_text_features(input_ids=self.ids(texts)).pooler_output
        return torch.nn.functional.normalize(found, dim=-1)

    @torch.no_grad()
    def images(self, images: list[Any]) -> Tensor:
        inputs = self.image_processor(images=images, return_tensors="pt")
        found = self.model.get_image_features(**inputs).pooler_output
        return torch.nn.functional.normalize(found, dim=-1)


def save_dual_encoder(folder: Path, kind: str) -> Peer:
    """Write one of `KINDS`; return the peer."""
    tokenizer = _tokenizer(folder, kind)
    size = len(tokenizer)
    square = {"height": SIZE, "width": SIZE}
    if kind in ("clip", "old clip", "metaclip 2"):
        eos = 2 if kind == "old clip" else tokenizer.eos_token_id
        text = TEXT | {"vocab_size": size, "eos_token_id": eos, "hidden_act": "gelu"}
        config, model = CLIPConfig, CLIPModel
        if kind == "metaclip 2":
            config, model = MetaClip2Config, MetaClip2Model
        peer: Any = model(config(text_config=text, vision_config=VISION, projection_dim=20))
        images: Any = CLIPImageProcessorPil(size={"shortest_edge": SIZE + 4}, crop_size=square)
    elif kind == "naflex":
        text = TEXT | {"vocab_size": size, "projection_size": VISION["hidden_size"]}
        vision = {key: value for key, value in VISION.items() if key != "image_size"}
        vision |= {"num_patches": 16}
        peer = Siglip2Model(Siglip2Config(text_config=text, vision_config=vision))
        images = Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=MAX_PATCHES)
    else:
        text = TEXT | {"vocab_size": size, "projection_size": VISION["hidden_size"]}
        peer = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
        images = SiglipImageProcessorPil(size=square, resample=2 if kind == "siglip 2" else 3)
    randomized(peer)
    peer.save_pretrained(folder)
    images.save_pretrained(folder)
    return Peer(peer, tokenizer, images)


def _tokenizer(folder: Path, kind: str) -> Any:
    if kind in ("clip", "old clip"):
        made: Any = CLIPTokenizer(*_clip_words())
    elif kind == "metaclip 2":
        made = PreTrainedTokenizerFast(
            tokenizer_object=_unigram("<s>", before="<s>"), **_names("<s>")
        )
    elif kind == "siglip spiece":
        made = SiglipTokenizer(str(_sentencepiece(folder)), model_input_names=["input_ids"])
    elif kind == "siglip":
        made = PreTrainedTokenizerFast(
            tokenizer_object=_unigram("", lower=True),
            eos_token="</s>",
            pad_token="</s>",
            unk_token="<unk>",
            model_input_names=["input_ids"],
        )
    elif kind == "siglip 2":
        made = PreTrainedTokenizerFast(
            tokenizer_object=_unigram("", lower=False),
            eos_token="</s>",
            pad_token="<pad>",
            unk_token="<unk>",
            model_input_names=["input_ids"],
            padding_side="right",
        )
    else:
        made = Siglip2Tokenizer(
            *_gemma_words(), model_input_names=["input_ids"], padding_side="right"
        )
        eos = ("<eos>", made.eos_token_id)
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=["$A", eos[0]], pair=["$A", "$B", eos[0]], special_tokens=[eos]
        )
    made.model_max_length = TEXT["max_position_embeddings"]
    made.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder) if kind != "siglip spiece" else made


def _names(bos: str) -> dict[str, Any]:
    return {"bos_token": bos, "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def _clip_words() -> tuple[dict[str, int], list[tuple[str, str]]]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t</w>"), ("o", "f</w>"), ("d", "o"), ("do", "g</w>")]
    words = [*letters, *(f"{one}</w>" for one in letters), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return {word: number for number, word in enumerate(words)}, merges


def _gemma_words() -> tuple[dict[str, int], list[tuple[str, str]]]:
    texts = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    texts += [f"<0x{number:02X}>" for number in range(256)]
    merges = [("▁", "c"), ("c", "a"), ("ca", "t"), ("o", "f"), ("▁", "of")]
    texts += ["▁", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?'"]
    texts += ["".join(pair) for pair in merges]
    return {text: number for number, text in enumerate(dict.fromkeys(texts))}, merges


def _unigram(bos: str, *, before: str = "", lower: bool = False) -> Tokenizer:
    """A Unigram tokenizer as XLM-R's and SigLIP's files have it."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>"] if bos else ["<pad>", "</s>", "<unk>"]
    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    words = [*letters, "▁cat", "▁photo", "▁of", "▁a", "▁dog", "ing"]
    vocabulary = [(one, 0.0) for one in pieces]
    vocabulary += [(word, -len(words) / (1 + len(word))) for word in words]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=pieces.index("<unk>")))
    if lower:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Lowercase(), normalizers.Replace("?", ""), normalizers.Strip()]
        )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(pieces)
    around = [(one, pieces.index(one)) for one in ([before] if before else []) + ["</s>"]]
    start = [before] if before else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*start, "$A", "</s>"], pair=[*start, "$A", "$B", "</s>"], special_tokens=around
    )
    return tokenizer


def _sentencepiece(folder: Path) -> Path:
    """Train a Unigram model as SigLIP's."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "spiece.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=file,
            model_type="unigram",
            vocab_size=40,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    return path
