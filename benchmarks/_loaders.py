"""Engines that load a model and say its first token: visavis, llama.cpp and transformers.

Started by load.py, one process per measurement. Nothing heavy is imported before `load`, so that
a cold start counts every import.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from _harness import serve

THREADS = int(os.environ["OMP_NUM_THREADS"])


class Visavis:
    def load(self, model: str, ids: list[int]) -> dict[str, Any]:
        import torch

        import visavis

        torch.set_num_threads(THREADS)
        started = time.perf_counter()
        loaded = visavis.load(model)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "token": int(loaded.trace(ids).logits[-1].argmax())}


class LlamaCpp:
    def load(self, model: str, ids: list[int]) -> dict[str, Any]:
        from _generators import LlamaCpp

        engine = LlamaCpp()
        started = time.perf_counter()
        engine.load(model)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "token": engine.run("", ids, 1)["ids"][0]}


class Transformers:
    def load(self, model: str, ids: list[int]) -> dict[str, Any]:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(THREADS)
        started = time.perf_counter()
        loaded = AutoModelForCausalLM.from_pretrained(
            Path(model).parent, gguf_file=Path(model).name, dtype=torch.bfloat16
        )
        seconds = time.perf_counter() - started
        with torch.inference_mode():
            token = int(loaded(torch.tensor([ids])).logits[0, -1].argmax())
        return {"seconds": seconds, "token": token}


if __name__ == "__main__":
    serve({"visavis": Visavis, "llama.cpp": LlamaCpp, "transformers": Transformers})
