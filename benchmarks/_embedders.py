"""Engines that embed texts and pictures: visavis, and the same models by others.

Started by embed.py. Of nano the peer is what a careful user of transformers would write: its
`LlamaModel` in bfloat16, cut off after the last layer that is read, its CLIP image processor, its
padded batches sorted by length. Weights, tokenizer and settings come from ours through a folder. A
LLaVA in transformers' own layout is read by sentence-transformers with its own modules.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _export import export, llama, rest, settings_of
from _harness import serve
from _llava import write_llava

THREADS = int(os.environ["OMP_NUM_THREADS"])
BATCH = 32
TEXT = {  # SmolLM2-135M without its vocabulary
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 4096,
}
VISION = {  # CLIP's ViT-B/16
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
}
WARM_UP = "A sentence to begin with."


class Visavis:
    """The public way: `Model.embed`."""

    def load(self, model: str) -> dict[str, Any]:
        import torch

        import visavis

        torch.set_num_threads(THREADS)
        self.model = visavis.load(model)
        return {"takes_images": self.model.takes_images, "name": self.model.name}

    def export(self, model: str, folder: str) -> dict[str, Any]:
        export(model, Path(folder))
        return {}

    def write(self, folder: str) -> dict[str, Any]:
        write_llava(Path(folder), TEXT, VISION)
        return {}

    def embed(self, items: list[dict[str, Any]], output: str) -> dict[str, Any]:
        import numpy as np

        started = time.perf_counter()
        vectors = self.model.embed([_item(item) for item in items])
        seconds = time.perf_counter() - started
        np.save(output, vectors)
        return {"seconds": seconds}


def _item(item: dict[str, Any]) -> Any:
    if "image" not in item:
        return item["text"]
    picture = Path(item["image"])
    return {"image": picture, "text": item["text"]} if "text" in item else picture


class Peer:
    """A model in both precisions, which `vectors` embeds with: one row for each item."""

    models: dict[Any, Any]
    vectors: Callable[..., Any]  # of a model and items

    def embed(
        self, items: list[dict[str, Any]], output: str, exact: bool = False
    ) -> dict[str, Any]:
        import numpy as np
        import torch

        model = self.models[torch.float32 if exact else torch.bfloat16]
        started = time.perf_counter()
        vectors = self.vectors(model, items)
        seconds = time.perf_counter() - started
        np.save(output, np.asarray(vectors, np.float32))
        return {"seconds": seconds}


class Transformers(Peer):
    """Padded batches through `LlamaModel`."""

    def load(self, folder: str) -> dict[str, Any]:
        import torch
        from tokenizers import Tokenizer
        from transformers import CLIPImageProcessorPil

        torch.set_num_threads(THREADS)
        torch.set_grad_enabled(False)
        self.settings = settings_of(folder)
        self.tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
        total, needed = self.settings["llama"]["num_hidden_layers"], max(self.settings["layers"])
        self.models = {}
        for dtype in (torch.bfloat16, torch.float32):
            model = llama(folder).model
            if needed < total:  # nobody wins by leaving out what nobody reads
                model.layers = model.layers[:needed]
                model.config.num_hidden_layers = needed
                model.norm = torch.nn.Identity()
            self.models[dtype] = model.to(dtype)
        self.tower, self.connector, self.head = rest(self.settings["config"], folder)
        if self.settings["processor"]:
            self.processor = CLIPImageProcessorPil(**_clip_settings(self.settings["processor"]))
        return {}

    def vectors(self, model: Any, items: list[dict[str, Any]]) -> Any:
        import torch

        encoded = [self._encode(item) for item in items]
        # pictures alone need no decoder, so they are batched by themselves
        order = sorted(
            range(len(items)), key=lambda i: (bool(items[i].get("text")), len(encoded[i][0]))
        )
        vectors: Any = [None] * len(items)
        for first in range(0, len(order), BATCH):
            chosen = order[first : first + BATCH]
            rows = self._batch(model, [items[i] for i in chosen], [encoded[i] for i in chosen])
            for index, row in zip(chosen, rows, strict=True):
                vectors[index] = row
        return torch.stack(vectors).numpy()

    def _encode(self, item: dict[str, Any]) -> tuple[list[int], int]:
        """Return token ids, and where the image's placeholders start (-1: none)."""
        pieces = [self.settings["prefix"]]
        if "image" in item:
            pieces.append("")
        pieces[-1] += item.get("text", "") + self.settings["suffix"]
        parts = [
            self.tokenizer.encode(piece, add_special_tokens=False).ids if piece else []
            for piece in pieces
        ]
        if self.settings["bos"] is not None:
            parts[0].insert(0, self.settings["bos"])
        if len(parts) == 1:
            return parts[0], -1
        return parts[0] + [0] * self.settings["tokens_per_image"] + parts[1], len(parts[0])

    def _batch(self, model: Any, items: list[Any], encoded: list[tuple[list[int], int]]) -> Any:
        import torch
        from PIL import Image
        from torch.nn import functional as F

        longest = max(len(ids) for ids, _ in encoded)
        ids = torch.zeros(len(encoded), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        is_image = torch.zeros(ids.shape, dtype=torch.bool)
        for row, (tokens, start) in enumerate(encoded):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
            if start >= 0:
                is_image[row, start : start + self.settings["tokens_per_image"]] = True
        inputs = model.embed_tokens(ids)
        seen = None
        if is_image.any():
            opened = [Image.open(item["image"]).convert("RGB") for item in items if "image" in item]
            pixels = self.processor(opened, return_tensors="pt")["pixel_values"]
            features = _features(self.tower, pixels)
            inputs[is_image] = self.connector(features).flatten(0, 1).to(inputs.dtype)
            seen = torch.zeros(len(ids), features.shape[-1])
            seen[is_image.any(1)] = features.mean(1)
        reads_tower = bool(self.head and self.head.config.tower_width)
        if reads_tower and not any(item.get("text") for item in items):
            return F.normalize(self.head.image(seen), dim=-1)
        hidden = model(
            inputs_embeds=inputs, attention_mask=mask, output_hidden_states=True
        ).hidden_states
        found = torch.cat([hidden[layer] for layer in self.settings["layers"]], -1).float()
        if self.settings["pooling"] == "last":
            return F.normalize(found[torch.arange(len(ids)), mask.sum(1) - 1], dim=-1)
        if self.settings["pooling"] == "mean":
            return F.normalize((found * mask[..., None]).sum(1) / mask.sum(1, True), dim=-1)
        total = torch.zeros(())
        for layer, chosen in (
            (self.head.text, (mask == 1) & ~is_image),
            (self.head.image, is_image),
        ):
            count = chosen.sum(1, keepdim=True)
            mean = (found * chosen[..., None]).sum(1) / count.clamp(min=1)
            if layer is self.head.image and reads_tower:
                if seen is None:
                    continue
                mean = seen
            total = total + layer(mean) * (count > 0)
        return F.normalize(total, dim=-1)


class SentenceTransformers(Peer):
    """Its modules for a model that sees; it sorts by length and pads by itself."""

    def load(self, folder: str) -> dict[str, Any]:
        import torch
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer import modules

        torch.set_num_threads(THREADS)
        self.models = {}
        for dtype in (torch.bfloat16, torch.float32):
            transformer = modules.Transformer(folder, model_kwargs={"dtype": dtype})
            width = transformer.get_embedding_dimension()
            pooling = modules.Pooling(width, pooling_mode="lasttoken")
            self.models[dtype] = SentenceTransformer(
                modules=[transformer, pooling, modules.Normalize()], device="cpu"
            )
        return {}

    def vectors(self, model: Any, items: list[dict[str, Any]]) -> Any:
        return model.encode(
            [item if len(item) > 1 else next(iter(item.values())) for item in items],
            batch_size=BATCH,
            show_progress_bar=False,
        )


def _features(tower: Any, pixels: Any) -> Any:
    """EfficientNet-Lite in plain calls of PyTorch, on the tower's weights: [N, P, 1280]."""
    from torch.nn import functional as F

    def convolve(layer: Any, x: Any) -> Any:
        kernel, stride = layer.kernel_size[0], layer.stride[0]
        if kernel > 1:  # TensorFlow's "SAME"
            short = [max((-(-s // stride) - 1) * stride + kernel - s, 0) for s in x.shape[-2:]]
            rows, columns = short
            x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return F.conv2d(x, layer.weight, layer.bias, stride, groups=layer.groups)

    x = F.relu6(convolve(tower.stem, pixels))
    for block in tower.blocks:
        inside = x if block.expand is None else F.relu6(convolve(block.expand, x))
        inside = convolve(block.project, F.relu6(convolve(block.depthwise, inside)))
        x = x + inside if x.shape == inside.shape else inside
    return F.relu6(convolve(tower.head, x)).flatten(2).transpose(1, 2)


def _clip_settings(processor: dict[str, Any]) -> dict[str, Any]:
    """Return transformers' names for our image processor's settings."""
    side = processor["size"]
    if processor["resize"] == "crop":
        size = {"shortest_edge": int(side / processor["crop_fraction"])}
    else:
        assert processor["resize"] == "squash", "the CLIP processor does not pad"
        size = {"height": side, "width": side}
    return {
        "size": size,
        "do_center_crop": processor["resize"] == "crop",
        "crop_size": {"height": side, "width": side},
        "resample": {"bilinear": 2, "bicubic": 3}[processor["resample"]],
        "image_mean": list(processor["mean"]),
        "image_std": list(processor["std"]),
    }


if __name__ == "__main__":
    serve(
        {
            "visavis": Visavis,
            "transformers": Transformers,
            "sentence-transformers": SentenceTransformers,
        }
    )
