"""A visavis model as an encoder of the package mteb, for MIEB, ViDoRe and MVEB.

    import mteb, visavis
    from visavis.evaluate.mteb import Encoder, use_local_files

    tasks = mteb.get_benchmark("ViDoRe(v2)").tasks
    mteb.evaluate(Encoder(visavis.load("…")), tasks)

mteb is not a dependency: install it beside visavis (`pip install mteb`).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from visavis.errors import InputError
from visavis.inputs import Image, Message, Prompt, Text, Video

if TYPE_CHECKING:
    from visavis.api import Model

PART = 256  # items that are embedded at a time


class Encoder:
    """mteb's EncoderProtocol over a loaded model.

    The instruction of a task goes to queries where the task has one for them, and to documents
    where it has one for those; how it is joined to the text is the model's prompt profile.

    Args:
        model: a loaded model, or what `visavis.load` takes.
        settings: further arguments of `visavis.load`.
    """

    def __init__(
        self,
        model: Model | str,
        revision: str | None = None,
        *,
        device: str | None = None,
        **settings: Any,
    ) -> None:
        if isinstance(model, str):
            from visavis.api import load

            settings |= {"device": device} if device else {}
            model = load(model, **settings)
        self.model = model
        self._revision = revision

    @property
    def mteb_model_meta(self) -> Any:
        """The model metadata that mteb writes beside results."""
        from mteb.models import ModelMeta

        name = self.model.name if "/" in self.model.name else f"visavis/{self.model.name}"
        return ModelMeta(
            loader=None,
            name=name,
            revision=self._revision or self.model.fingerprint[:12],
            release_date=None,
            languages=None,
            n_parameters=self.model.num_parameters,
            memory_usage_mb=None,
            max_tokens=self.model.context_length,
            embed_dim=self.model.embedding_dim,
            license=None,
            open_weights=True,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch"],
            similarity_fn_name="cosine",
            use_instructions=True,
            training_datasets=None,
            modalities=["text", "image", "video"] if self.model.takes_images else ["text"],
        )

    def encode(
        self,
        inputs: Iterable[dict[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: Any = None,
        **settings: Any,
    ) -> np.ndarray:
        """Return unit vectors, float32 [N, D], of batches with `text`, `image` and `video`."""
        instruction = task_instruction(task_metadata, prompt_type)
        prompts = [prompt for batch in inputs for prompt in prompts_of(batch)]
        parts = [
            self.model.embed(prompts[first : first + PART], instruction=instruction)
            for first in range(0, len(prompts), PART)
        ]
        empty = np.empty((0, self.model.embedding_dim), np.float32)
        return np.concatenate(parts) if parts else empty

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Return cosines, [N, M]."""
        import torch

        return torch.as_tensor(embeddings1) @ torch.as_tensor(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Return the cosine of each pair, [N]."""
        import torch

        return (torch.as_tensor(embeddings1) * torch.as_tensor(embeddings2)).sum(-1)


def task_instruction(task_metadata: Any, prompt_type: Any) -> str | None:
    """Return a task's instruction for queries or documents, or None.

    An instruction that is one text is for queries, and for tasks without queries.
    """
    prompt = getattr(task_metadata, "prompt", None)
    side = getattr(prompt_type, "value", prompt_type)
    if isinstance(prompt, dict):
        return prompt.get(side) if side else None
    return prompt if prompt and side != "document" else None


def prompts_of(batch: dict[str, Any]) -> list[Prompt]:
    """Return the items of a batch: images and videos, then the text.

    Raises:
        InputError: the batch has none of `text`, `image` and `video`.
    """
    columns = [name for name in ("image", "video", "text") if name in batch]
    if not columns:
        raise InputError(f"a batch has {', '.join(batch)}, expected text, image or video")
    prompts = []
    for values in zip(*(batch[name] for name in columns), strict=True):
        parts: list[Any] = []
        for name, value in zip(columns, values, strict=True):
            if name == "image":
                images = value if isinstance(value, list | tuple) else [value]
                parts += [_image(one) for one in images if one is not None]
            elif name == "video" and value is not None:
                parts.append(_video(value))
            elif name == "text" and isinstance(value, str) and value.strip():
                parts.append(Text(value))
        prompts.append(Prompt((Message("user", tuple(parts)),)))
    return prompts


def _image(value: Any) -> Image:
    """Return an image from pixels, bytes, or {bytes, path} as `datasets` gives undecoded ones."""
    if isinstance(value, dict):
        value = value.get("bytes") or Path(value["path"])
    return Image(value)


def _video(value: Any) -> Video:
    """Return a video from a path, bytes, or frames uint8 [T, C, H, W] or [T, H, W, C]."""
    if isinstance(value, str | Path | bytes):
        return Video(Path(value) if isinstance(value, str) else value)
    frames = np.asarray(getattr(value, "frames", value))
    if frames.ndim != 4:
        raise InputError(f"a video is an array of shape {frames.shape}, expected 4 axes")
    if frames.shape[1] == 3 and frames.shape[-1] != 3:
        frames = frames.transpose(0, 2, 3, 1)
    return Video(tuple(Image(frame) for frame in frames))


def use_local_files(tasks: Iterable[Any], folder: str | Path) -> None:
    """Make tasks read `<folder>/<task name>` or `<folder>/<repository name>` and no hub.

    Such a folder holds parquet files and a README.md that lists them as configs. Set HF_HUB_OFFLINE
    to 1. The library `datasets` caches by path: give a changed folder another name.

    Raises:
        InputError: a task's folder is not there.
    """
    for task in tasks:
        dataset = task.metadata.dataset
        names = (task.metadata.name, str(dataset.get("path", "")).rsplit("/", 1)[-1])
        found = next(
            (Path(folder) / name for name in names if (Path(folder) / name).is_dir()), None
        )
        if found is None:
            raise InputError(f"{folder} holds no folder {' or '.join(names)} for {names[0]}")
        dataset.update(path=str(found), revision="local")
