"""Multi-vector models of transformers, such as ColPali: settings, names of tensors, prompts.

A vision-language model (`vlm_config`, tensors below `vlm`) and a linear layer that makes a vector
of each token's last hidden state. Opens no file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from visavis.checkpoints.transformers.config_reader import Json, count, require, section
from visavis.checkpoints.weight_mapping import MappingRow, NameTable
from visavis.errors import CheckpointError
from visavis.model.config import VLMConfig
from visavis.processing.prompt_config import PromptConfig

VLM = "vlm_config"
HEAD = "embedding_proj_layer"
NUM_AUGMENTATION_TOKENS = 10  # after a query, as "reasoning buffers" (Faysse et al. 2024)


@dataclass(frozen=True)
class MultiVector:
    """A model type.

    Args:
        vlm: model type of a `vlm_config` that names none.
        image: the image placeholder in `visual_prompt_prefix`.
        visual_prompt_prefix, query_prefix: what a processor_config.json leaves out.
        document: the form of an image, with {prefix} for `visual_prompt_prefix`.
        query: the form of a query, with {prefix} and {augmentation}.
        passage: the form of a text that is to be found, as colpali-engine has it.
        names: beginnings of names in the model within, and what they are here.
        augmentation: the token that a query is augmented with; empty: the padding token.
        image_text: how an image is written, see `processing/visual_text.py`.
    """

    vlm: str
    image: str
    visual_prompt_prefix: str
    query_prefix: str
    document: str
    query: str
    passage: str
    names: tuple[tuple[str, str], ...] = ()
    augmentation: str = ""
    image_text: Literal["", "idefics3"] = ""

    @property
    def writes_bos(self) -> bool:
        """Whether the forms hold what a tokenizer puts around a text, and it adds nothing."""
        return "{bos}" in self.query


KINDS = {
    "colpali": MultiVector(
        vlm="paligemma",
        image="<image>",
        visual_prompt_prefix="Describe the image.",
        query_prefix="Question: ",
        document="<image>{bos}{prefix}\n",
        query="{bos}{prefix}{text}{augmentation}\n",
        passage="{bos}{text}",
    ),
    "colqwen2": MultiVector(
        vlm="qwen2_vl",
        image="<|image_pad|>",
        visual_prompt_prefix="<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        "Describe the image.<|im_end|><|endoftext|>",
        query_prefix="Query: ",
        document="{prefix}",
        query="{prefix}{text}{augmentation}\n",
        passage="{text}",
        names=(("model.", "language_model."),),
    ),
    "colmodernvbert": MultiVector(
        vlm="modernvbert",
        image="<image>",
        visual_prompt_prefix="<|begin_of_text|>User:<image>Describe the image."
        "<end_of_utterance>\nAssistant:",
        query_prefix="",
        document="{prefix}",
        query="{prefix}{text}{augmentation}",
        passage="{text}",
        augmentation="<end_of_utterance>",
        image_text="idefics3",
    ),
}


def multi_vector_parts(config: Json) -> Json:
    """Return the config of the model within.

    Raises:
        CheckpointError: it is of another type than this kind of model has.
    """
    kind = KINDS[config["model_type"]]
    inner = {"model_type": kind.vlm} | section(config, VLM)
    found = inner["model_type"]
    require(f"{VLM}.model_type", found, found == kind.vlm, repr(kind.vlm))
    return inner


def with_multi_vectors(config: Json, inner: VLMConfig) -> VLMConfig:
    """Return the model within, with the layer that makes the vectors. No output layer is kept.

    Raises:
        CheckpointError: `embedding_dim` is no number.
    """
    dim = count({"embedding_dim": 128} | dict(config), "embedding_dim")
    decoder = replace(inner.decoder, tied_head=True)
    return replace(inner, decoder=decoder, multi_vector_dim=dim)


def multi_vector_table(config: Json, inner: NameTable) -> NameTable:
    """Return the names of the tensors, made of those of the model within."""

    def spelled(name: str) -> str:
        for theirs, ours in KINDS[config["model_type"]].names:
            if name.startswith(theirs):
                return f"vlm.{ours}{name.removeprefix(theirs)}"
        return f"vlm.{name}"

    heads = [
        MappingRow(f"multi_vector_head.{kind}", (f"{HEAD}.{kind}",)) for kind in ("weight", "bias")
    ]
    rows = [
        replace(row, theirs=tuple(map(spelled, row.theirs)))
        for row in inner.rows
        if not row.ours.startswith("decoder.head.")
    ]
    aliases = [(f"vlm.{name}", spelled(target)) for name, target in inner.aliases]
    aliases += [
        (f"vlm.{theirs}**", f"vlm.{ours}**") for theirs, ours in KINDS[config["model_type"]].names
    ]
    ignored = [f"vlm.{name}" for name in inner.ignored]
    unused = ("vlm.lm_head.*", "vlm.language_model.lm_head.*")  # of older files
    return NameTable((*heads, *rows), tuple(aliases), (*ignored, *unused))


def multi_vector_prompts(config: Json, processor: Json, *, bos: str, pad: str) -> PromptConfig:
    """Return how queries and documents are embedded.

    Args:
        processor: processor_config.json.
        bos, pad: texts of the tokenizer's tokens; `pad` is what a query is augmented with.

    Raises:
        CheckpointError: a prefix is no text, or names no place for the image, or several.
    """
    kind = KINDS[config["model_type"]]
    names = ("visual_prompt_prefix", "query_prefix")
    texts: dict[str, Any] = {name: processor.get(name) or getattr(kind, name) for name in names}
    for name, text in texts.items():
        require(name, text, isinstance(text, str) and "{" not in text, "a text without braces")
    document = kind.document.replace("{prefix}", texts["visual_prompt_prefix"])
    document = document.replace(kind.image, "{visual}")
    if document.count("{visual}") != 1:
        raise CheckpointError(
            f"visual_prompt_prefix is {texts['visual_prompt_prefix']!r}, expected {kind.image!r} "
            "in it once: that is where the image stands; copy processor_config.json again."
        )
    needed = {"padding": not kind.augmentation and not pad}
    needed["beginning-of-sequence"] = kind.writes_bos and not bos
    for role, is_missing in needed.items():
        if is_missing:
            raise CheckpointError(
                f"the tokenizer names no {role} token, expected the one that stands in each "
                "query; copy tokenizer_config.json again."
            )
    query = kind.query.replace("{prefix}", texts["query_prefix"])
    augmentation = (kind.augmentation or pad) * NUM_AUGMENTATION_TOKENS
    return PromptConfig(
        image_text=kind.image_text,
        text_form=query.replace("{augmentation}", augmentation).replace("{bos}", bos),
        visual_form=document.replace("{bos}", bos),
        document_form=kind.passage.replace("{bos}", bos),
        pooling="multi",
    )
