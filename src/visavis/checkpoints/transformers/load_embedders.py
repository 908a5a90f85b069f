"""Folders of models that only embed, as transformers writes them: CLIP and its like,
EmbeddingGemma 2."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import normalizers

from visavis.checkpoints.checkpoint_format import CONFIG, refuse_quantised
from visavis.checkpoints.tensor_files import read_json
from visavis.checkpoints.transformers.config_reader import Json, require, without_nulls
from visavis.checkpoints.transformers.dual_encoders import dual_config, dual_table
from visavis.checkpoints.transformers.embedding_gemma2 import (
    KIND,
    TOKENS,
    gemma_config,
    gemma_table,
)
from visavis.checkpoints.transformers.load import TransformersFormat, image_processor
from visavis.checkpoints.weight_mapping import NameTable
from visavis.errors import CheckpointError
from visavis.model.config import VLMConfig
from visavis.model.embedder_config import ClipTextConfig
from visavis.processing.config import ImageProcessorConfig
from visavis.processing.prompt_config import PromptConfig
from visavis.processing.tokenizer import SpecialTokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What stands for an item; an instruction is left out, because no such model was trained with any.
PROFILE = PromptConfig(text_form="{text}", visual_form="{visual}", pooling="head")


@dataclass(kw_only=True)
class DualEncoderFormat(TransformersFormat):
    """CLIP, SigLIP, SigLIP 2 or MetaCLIP 2 as transformers writes it."""

    kind, title = "dual_encoder", "dual encoder, transformers"
    model_types = ("clip", "siglip", "siglip2", "metaclip_2")
    target = ""

    @classmethod
    def names(cls, data: Json, config: VLMConfig) -> NameTable:
        return dual_table(config)

    @classmethod
    def read_config(cls, path: Path) -> tuple[VLMConfig, ImageProcessorConfig | None]:
        data = read_json(path / CONFIG)
        refuse_quantised(data, path)
        words = path / "tokenizer_config.json"
        config = dual_config(data, read_json(words) if words.is_file() else {})
        return config, image_processor(config, path, data.get("model_type"))

    def tokenizer(self) -> tuple[Tokenizer, SpecialTokens]:
        tokenizer, specials = super().tokenizer()
        if self.settings["model_type"] == "siglip2":  # whatever tokenizer_config.json calls it
            rules = [normalizers.Lowercase(), tokenizer.normalizer]
            tokenizer.normalizer = normalizers.Sequence([rule for rule in rules if rule])
        return tokenizer, specials

    def prompt_config(self, tokenizer: Tokenizer, specials: SpecialTokens) -> PromptConfig:
        return PROFILE

    def special_tokens(
        self, tokenizer: Tokenizer, specials: SpecialTokens, folder: Path
    ) -> SpecialTokens:
        tower = self.config.text_tower if self.config else None
        assert isinstance(tower, ClipTextConfig)
        if tower.pooling == "eos" and specials.appended[:1] != (tower.eos_id,):
            raise CheckpointError(
                f"the tokenizer of {folder} puts {list(specials.appended)} after a text, but its "
                f"config.json says that the vector is taken at the token {tower.eos_id} "
                "(eos_token_id); tokenizer and config belong to different models."
            )
        return specials


@dataclass(kw_only=True)
class EmbeddingGemma2Format(TransformersFormat):
    """EmbeddingGemma 2 as transformers writes it."""

    kind, title, model_types = KIND, "EmbeddingGemma 2, transformers", (KIND,)
    target = ""

    @classmethod
    def names(cls, data: Json, config: VLMConfig) -> NameTable:
        return gemma_table()

    @classmethod
    def read_config(cls, path: Path) -> tuple[VLMConfig, ImageProcessorConfig | None]:
        data = read_json(path / CONFIG)
        refuse_quantised(data, path)
        config = gemma_config(data)
        return config, image_processor(config, path)

    def prompt_config(self, tokenizer: Tokenizer, specials: SpecialTokens) -> PromptConfig:
        settings = TOKENS | without_nulls(self.settings)
        require("pooling", self.pooling, self.pooling in ("", "mean"), "the mean")
        if self.config is None or self.config.tower is None:
            marks = ["", ""]
        else:
            ids = [settings["boi_token_id"], settings["eoi_token_id"]]
            texts = [tokenizer.id_to_token(one) if type(one) is int else None for one in ids]
            if None in texts:
                raise CheckpointError(
                    f"config.json of {self.path} names {ids} as the tokens around an image, which "
                    "its tokenizer does not have; the two belong to different models."
                )
            marks = [str(text) for text in texts]
        return PromptConfig(
            pooling="head",
            embed_image_start=marks[0],
            embed_image_end=marks[1],
            instruction_form="task: {instruction} | query: {text}",
        )
