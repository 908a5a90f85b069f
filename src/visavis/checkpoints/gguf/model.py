"""A GGUF file, whole or split, loaded as a model: weights, tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path

import torch

from visavis.checkpoints.gguf.decoder import decoder_config, decoder_state
from visavis.checkpoints.gguf.split import open_model
from visavis.checkpoints.loaded import Loaded, auto_dtype, build, fingerprint
from visavis.checkpoints.packing import pack_linears
from visavis.model.config import VLMConfig
from visavis.processing.profile import PromptProfile
from visavis.processing.tokenizer import build_tokenizer, special_tokens


def load_gguf(path: Path, *, precision: str = "auto", device: str = "cpu") -> Loaded:
    """Load a language model from a GGUF file (and the other parts of a split one), with its
    tokenizer and chat template.

    Raises:
        CheckpointError: a file is damaged, or of a variant that is not read.
    """
    file, paths = open_model(path)
    config = VLMConfig(decoder=decoder_config(file))
    dtype = auto_dtype(precision, device)
    state = {}
    for name, array in decoder_state(file):
        tensor = torch.from_numpy(array)
        state[name] = tensor if tensor.dim() == 1 else tensor.to(dtype)
    vlm = build(config, state, dtype, device, where=str(path))
    if device == "cpu" and dtype == torch.bfloat16:
        pack_linears(vlm.decoder, file)
    return Loaded(
        name=str(file.metadata.get("general.name", path.stem)),
        vlm=vlm,
        tokenizer=build_tokenizer(file.metadata),
        specials=special_tokens(file.metadata),
        profile=PromptProfile(jinja=str(file.metadata.get("tokenizer.chat_template", ""))),
        processor=None,
        fingerprint=fingerprint(paths, {"precision": str(dtype)}),
        files=paths,
    )
