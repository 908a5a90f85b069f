"""Engines that embed with and prefill models of random weights of several families.

Started by families.py. The peer is the stock class of transformers in the same number type; it gets
our token ids, so that tokenizing costs it nothing, and prepares images with its own processor.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from _harness import serve

THREADS = int(os.environ["OMP_NUM_THREADS"])
VOCABULARY = 1536
PLACES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
SPECIALS = [
    *("<|endoftext|>", "<bos>", "<|im_start|>", "<|im_end|>", "<image>", "<|image_pad|>"),
    *("<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<fake_token_around_image>"),
    *("<global-img>", "<end_of_utterance>", *PLACES),
]
TEXT = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "vocab_size": VOCABULARY,
}
QUICK = {"num_hidden_layers": 2}
SIGLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
MULTI = ("colpali", "colqwen2")


class Visavis:
    """The public calls: `Model.embed`, `embed_multi` and `trace`."""

    def load(self, folder: str) -> dict[str, Any]:
        import torch

        import visavis

        torch.set_num_threads(THREADS)
        self.model = visavis.load(folder)
        return {"dtype": str(self.model.vlm.decoder.dtype).removeprefix("torch.")}

    def ids(self, items: list[dict[str, Any]], prefill: bool) -> dict[str, Any]:
        """Return the token ids of items, as they are embedded or prefilled."""
        from visavis.inputs import Prompt

        if prefill:
            return {"ids": [self.model.trace(_item(one)).token_ids.tolist() for one in items]}
        return {"ids": [self.model.prepare(Prompt.of(_item(one))).token_ids for one in items]}

    def embed(self, items: list[dict[str, Any]], output: str, **_: Any) -> dict[str, Any]:
        import numpy as np

        model, given = self.model, [_item(one) for one in items]
        started = time.perf_counter()
        found = model.embed_multi(given) if model.has_multi_vectors else list(model.embed(given))
        seconds = time.perf_counter() - started
        np.savez(output, *found)
        return {"seconds": seconds}

    def prefill(self, items: list[dict[str, Any]], output: str, **_: Any) -> dict[str, Any]:
        import numpy as np

        started = time.perf_counter()
        found = [self.model.trace(_item(one)).logits[-1] for one in items]
        seconds = time.perf_counter() - started
        np.savez(output, *found)
        return {"seconds": seconds}


def _item(item: dict[str, Any]) -> Any:
    if "image" not in item:
        return item["text"]
    image = Path(item["image"])
    return {"image": image, "text": item["text"]} if "text" in item else image


class Transformers:
    """The stock class, one item at a time without padding."""

    def write(self, family: str, folder: str, quick: bool) -> dict[str, Any]:
        import torch

        torch.manual_seed(0)
        self.family = family
        self.token, model, self.processor = _make(family, quick)
        for name, weight in model.named_parameters():  # outputs of order 1, unlike fresh ones
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
            elif name.endswith("bias"):
                torch.nn.init.zeros_(weight)
        self.exact = model.eval().float()
        self.exact.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        tokenizer = _tokenizer()
        tokenizer.save_pretrained(folder)
        return {}

    def load(self, dtype: str) -> dict[str, Any]:
        import copy

        import torch

        torch.set_num_threads(THREADS)
        self.fast = copy.deepcopy(self.exact).to(getattr(torch, dtype))
        return {}

    def embed(self, items: list[dict[str, Any]], output: str, **settings: Any) -> dict[str, Any]:
        return self._run(items, output, "embed", **settings)

    def prefill(self, items: list[dict[str, Any]], output: str, **settings: Any) -> dict[str, Any]:
        return self._run(items, output, "prefill", **settings)

    def _run(
        self, items: list[dict[str, Any]], output: str, do: str, *, ids: Any, exact: bool = False
    ) -> dict[str, Any]:
        import numpy as np
        import torch

        model = self.exact if exact else self.fast
        started = time.perf_counter()
        with torch.inference_mode():
            found = [
                self._one(model, one, own, do).float().numpy()
                for one, own in zip(items, ids, strict=True)
            ]
        seconds = time.perf_counter() - started
        np.savez(output, *found)
        return {"seconds": seconds}

    def _one(self, model: Any, item: dict[str, Any], ids: list[int], do: str) -> Any:
        import torch
        from PIL import Image

        inputs: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "image" in item:
            with Image.open(item["image"]) as image:
                seen = self.processor(images=[image.convert("RGB")], return_tensors="pt")
            pixels = seen["pixel_values"].to(model.dtype)
            inputs["pixel_values"] = pixels
            if "image_grid_thw" in seen:
                grid = inputs["image_grid_thw"] = seen["image_grid_thw"]
                types = (inputs["input_ids"] == self.token).int()
                if self.family == "colqwen2":
                    inputs["pixel_values"] = pixels[None]
                    positions = model.vlm.get_rope_index(
                        inputs["input_ids"],
                        image_grid_thw=grid,
                        attention_mask=inputs["attention_mask"],
                        mm_token_type_ids=types,
                    )
                    inputs["position_ids"] = positions[0]
                else:
                    inputs["mm_token_type_ids"] = types
        if self.family in MULTI:
            return model(**inputs).embeddings[0]
        if do == "prefill":
            return model(**inputs).logits[0, -1]
        last = model.model(**inputs).last_hidden_state[0, -1]
        return torch.nn.functional.normalize(last.float(), dim=0)


def _tokenizer() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        add_bos_token=False,
    )


def _make(family: str, quick: bool) -> tuple[int, Any, Any]:
    """Return the image placeholder, a stock model with random weights, and its image processor."""
    import transformers as hf
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        Idefics3ImageProcessorPil,
    )
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    tokens = _tokenizer().get_vocab()
    text, siglip = TEXT | (QUICK if quick else {}), SIGLIP | (QUICK if quick else {})
    depth = 2 if quick else 12
    if family == "smolvlm":
        vision = siglip | {"image_size": 384, "patch_size": 16}
        inner = {"text_config": hf.LlamaConfig(**text), "vision_config": vision}
        config = hf.SmolVLMConfig(**inner, image_token_id=tokens["<image>"], scale_factor=4)
        cut = {"size": {"longest_edge": 768}, "max_image_size": {"longest_edge": 384}}
        model = hf.SmolVLMForConditionalGeneration(config)
        return tokens["<image>"], model, Idefics3ImageProcessorPil(**cut)
    if family == "colpali":
        vision = siglip | {"image_size": 224, "patch_size": 14, "vision_use_head": False}
        own = text | {"model_type": "gemma", "head_dim": 64}
        inner = hf.PaliGemmaConfig(
            text_config=own,
            vision_config=vision | {"model_type": "siglip_vision_model"},
            image_token_index=tokens["<image>"],
            projection_dim=576,
        )
        size = {"height": 224, "width": 224}
        model = hf.ColPaliForRetrieval(hf.ColPaliConfig(vlm_config=inner.to_dict()))
        return tokens["<image>"], model, SiglipImageProcessorPil(size=size)
    patch = 16 if family == "qwen3_vl" else 14
    bounds = {"min_pixels": 64 * (2 * patch) ** 2, "max_pixels": 256 * (2 * patch) ** 2}
    processor = Qwen2VLImageProcessorPil(patch_size=patch, **bounds)
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    ids = {f"{kind}_token_id": tokens[name] for kind, name in names.items()}
    ids |= {f"vision_{end}_token_id": tokens[f"<|vision_{end}|>"] for end in ("start", "end")}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    text = text | {"rope_parameters": rope}
    if family in ("qwen2_vl", "colqwen2"):
        vision = {"depth": depth, "embed_dim": 768, "hidden_size": 576, "num_heads": 12}
        config = hf.Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
        if family == "qwen2_vl":
            return ids["image_token_id"], hf.Qwen2VLForConditionalGeneration(config), processor
        config = hf.ColQwen2Config(vlm_config=config.to_dict())
        return ids["image_token_id"], hf.ColQwen2ForRetrieval(config), processor
    vision = {
        "depth": depth,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "out_hidden_size": 576,
        "num_heads": 12,
    }
    if family == "qwen2_5_vl":
        vision["fullatt_block_indexes"] = [depth - 1]
        config = hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
        return ids["image_token_id"], hf.Qwen2_5_VLForConditionalGeneration(config), processor
    vision["deepstack_visual_indexes"] = [0, 1]
    text = text | {"head_dim": 64}
    config = hf.Qwen3VLConfig(text_config=text, vision_config=vision, **ids)
    return ids["image_token_id"], hf.Qwen3VLForConditionalGeneration(config), processor


if __name__ == "__main__":
    serve({"visavis": Visavis, "transformers": Transformers})
