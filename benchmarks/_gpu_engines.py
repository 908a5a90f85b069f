"""Engines on a GPU: visavis and transformers on one folder of random weights, of real shapes.

Started by cuda.py, one process each; see `_harness.serve`. All get the same token ids and choose
greedily. A `device` of "cpu" runs the same in float32, so that it can be tested anywhere.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from _harness import serve

COMMON: dict[str, Any] = {
    "model_type": "qwen2",
    "num_hidden_layers": 28,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
}
QWEN2: dict[str, dict[str, Any]] = {  # language models of Qwen2-VL's sizes
    "2B": COMMON
    | {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "7B": COMMON
    | {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
}
TINY: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class Visavis:
    """The engine that `Model.chat` uses and the packed pass that `Model.embed` uses, given ids."""

    def load(self, folder: str, device: str) -> dict[str, Any]:
        import visavis

        precision = "f32" if device == "cpu" else "bf16"
        self.vlm = visavis.load(folder, device=device, precision=precision).vlm.eval()
        self.device = device
        decoder = self.vlm.decoder
        blocks = sum(weight.numel() for weight in decoder.blocks.parameters())
        head = decoder.head.weight
        return {"block_weights": blocks, "read_bytes": (blocks + head.numel()) * head.itemsize}

    def peaks(self) -> dict[str, Any]:
        import torch

        from visavis.bench import measure_machine

        dtype = self.vlm.decoder.dtype
        found = measure_machine(torch.device(self.device), dtype)
        return {"name": found.device, "bandwidth": found.bandwidth, "flops": found.flops}

    def batch(self, texts: list[list[int]]) -> Any:
        import torch

        from visavis.model.batch import PackedBatch

        ids = torch.tensor([token for text in texts for token in text])
        positions = torch.cat([torch.arange(len(text)) for text in texts])
        return PackedBatch(ids, positions, tuple(map(len, texts))).to(self.device)

    def embed(self, batches: list[list[list[int]]]) -> dict[str, Any]:
        import torch

        found, started = [], time.perf_counter()
        with torch.inference_mode():
            for texts in batches:
                batch = self.batch(texts)
                last = torch.tensor(batch.lengths).cumsum(0) - 1
                found.append(self.vlm(batch)[-1][last.to(self.device)].cpu())
        return {"seconds": time.perf_counter() - started, "vectors": torch.cat(found).tolist()}

    def run(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        from visavis.generate.engine import Engine, GeneratedSequence

        sequences = [
            GeneratedSequence(
                self.batch([ids]),
                lambda scores: int(scores.argmax()),
                new_tokens,
                frozenset(),
            )
            for ids in prompts
        ]
        started, read = time.perf_counter(), 0.0
        for _ in Engine(self.vlm, max_sequences=len(prompts)).run(sequences):
            if not read and all(sequence.tokens for sequence in sequences):
                read = time.perf_counter()
        decode = time.perf_counter() - read
        ids = [sequence.tokens for sequence in sequences]
        return {"prefill_s": read - started, "decode_s": decode, "ids": ids}


class Transformers:
    """`generate`, and the model's own forward on batches padded to their longest text."""

    def make(self, folder: str, shape: str, device: str) -> dict[str, Any]:
        """Write a model of random weights in a shape."""
        import json

        import torch
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        config = AutoConfig.for_model(**QWEN2.get(shape, TINY))
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.save_pretrained(folder)
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = Tokenizer(models.BPE(vocab={one: i for i, one in enumerate(letters)}, merges=[]))
        words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        words.save(str(Path(folder) / "tokenizer.json"))
        settings = json.dumps({"eos_token": letters[0], "add_bos_token": False})
        (Path(folder) / "tokenizer_config.json").write_text(settings, encoding="utf-8")
        return {"vocab_size": config.vocab_size}

    def load(self, folder: str, device: str) -> dict[str, Any]:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_grad_enabled(False)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.device = device
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        for choice in ("eos_token_id", "pad_token_id"):  # always the full number of tokens
            setattr(self.model.generation_config, choice, None)
        return {}

    def embed(self, batches: list[list[list[int]]]) -> dict[str, Any]:
        import torch

        found, started = [], time.perf_counter()
        for texts in batches:
            lengths = torch.tensor([len(text) for text in texts])
            longest = int(lengths.max())
            ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
            mask = torch.arange(longest) < lengths[:, None]
            hidden = self.model.model(
                input_ids=ids.to(self.device), attention_mask=mask.long().to(self.device)
            ).last_hidden_state
            rows = torch.arange(len(texts), device=self.device)
            found.append(hidden[rows, (lengths - 1).to(self.device)].float().cpu())
        return {"seconds": time.perf_counter() - started, "vectors": torch.cat(found).tolist()}

    def run(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        import torch
        from _generators import Clock

        clock, started = Clock(), time.perf_counter()
        ids = torch.tensor(prompts, device=self.device)
        tokens = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=clock,
        )
        first = clock.times[1]  # the prompt itself is put first
        answers = tokens[:, len(prompts[0]) :].tolist()
        return {"prefill_s": first - started, "decode_s": clock.times[-1] - first, "ids": answers}

    def judge(self, prompts: list[list[int]], answers: list[list[int]]) -> dict[str, Any]:
        """Return the largest lead, in logits, of the best token over the chosen one."""
        import torch

        leads = []
        for ids, answer in zip(prompts, answers, strict=True):
            read = torch.tensor([ids + answer[:-1]], device=self.device)
            logits = self.model(read, logits_to_keep=len(answer)).logits[0].float()
            chosen = logits.gather(1, torch.tensor(answer, device=self.device)[:, None])[:, 0]
            leads.append(float((logits.amax(-1) - chosen).max()))
        return {"lead": max(leads)}


if __name__ == "__main__":
    serve({"visavis": Visavis, "transformers": Transformers})
