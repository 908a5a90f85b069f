"""A visavis model as the only module of a `SentenceTransformer`.

`visavis convert --to sentence-transformers` writes a modules.json that names `VisavisModule`, and
sentence-transformers imports it from the installed visavis; the folder contains no code. Vectors of
texts, images and both are those of `Model.embed`. The `prompt` of sentence-transformers is the
`instruction` of `Model.embed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from sentence_transformers.base.modality import is_image_url_or_path
from sentence_transformers.base.modules import InputModule

from visavis.api import Model
from visavis.checkpoints.checkpoint import Checkpoint
from visavis.checkpoints.load import load_checkpoint
from visavis.checkpoints.sentence_transformers import SentenceTransformersFormat
from visavis.inputs import Image


class VisavisModule(InputModule):
    """Embeds the items that `visavis.Model.embed` accepts; a string that is the path of an
    image is an image, as in sentence-transformers."""

    def __init__(self, loaded: Checkpoint) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.loaded = loaded
        self.vlm = loaded.vlm  # a submodule: moves and casts reach it
        self.model = Model.of(loaded)
        self.tokenizer = loaded.tokenizer

    @property
    def modalities(self) -> list[Any]:
        if not self.model.takes_images:
            return ["text"]
        if self.vlm.config.is_dual:
            return ["text", "image"]
        return ["text", "image", ("image", "text"), "message"]

    @property
    def max_seq_length(self) -> int:
        return self.model.context_length

    def get_embedding_dimension(self) -> int:
        return self.model.embedding_dim

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, **_: Any
    ) -> dict[str, Any]:
        """Return the items as they are: they become tokens and pixels where they are embedded."""
        return {"items": [_item(one) for one in inputs], "instruction": prompt}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Add `sentence_embedding`, float32 [N, D]."""
        vectors = self.model.embed(features["items"], instruction=features["instruction"])
        return {**features, "sentence_embedding": torch.from_numpy(vectors).to(self.model.device)}

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        SentenceTransformersFormat.save(self.loaded, Path(output_path))

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        init_defaults: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Self:
        """Load the folder with `visavis.load`; `model_kwargs` may hold its `precision`."""
        folder = cls.load_dir_path(
            model_name_or_path,
            subfolder=subfolder,
            token=token,
            cache_folder=cache_folder,
            revision=revision,
            local_files_only=local_files_only,
        )
        precision = (settings.get("model_kwargs") or {}).get("precision", "auto")
        assert folder is not None, model_name_or_path
        return cls(load_checkpoint(folder, precision=precision, device="cpu"))


def _item(one: Any) -> Any:
    """Return an input as `Model.embed` takes it."""
    if isinstance(one, str) and is_image_url_or_path(one):
        return Image(one)
    return one
