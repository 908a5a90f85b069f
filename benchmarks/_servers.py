"""Servers of one GGUF file: visavis and llama.cpp, and visavis' bare engine.

Started by serve.py and serve_load.py, one process each; see `_harness.serve`.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from _harness import serve

THREADS = int(os.environ["OMP_NUM_THREADS"])
PROMPT_CONTEXT = 512  # tokens of each of llama.cpp's slots


class Visavis:
    """`visavis serve` in a thread of this process, with its limits as they are by default."""

    def load(self, model: str, slots: int, embedding: bool = False) -> dict[str, Any]:
        import torch

        import visavis
        from visavis.serve import listen
        from visavis.serve.config import make_config
        from visavis.serve.run import make_server

        torch.set_num_threads(THREADS)
        self.model = visavis.load(model)
        config = make_config({"models": {"model": model}, "max_sequences": slots})
        self.server = make_server(config, models={"model": self.model})
        listening = listen(0)
        run = {"target": self.server.run, "kwargs": {"sockets": [listening]}}
        threading.Thread(**run, daemon=True).start()
        while not self.server.started:
            time.sleep(0.01)
        return {"address": f"http://127.0.0.1:{listening.getsockname()[1]}"}

    def resident(self) -> dict[str, Any]:
        """Return this process's resident memory in MB."""
        with open("/proc/self/status", encoding="utf-8") as status:
            return {"mb": int(status.read().partition("VmRSS:")[2].split()[0]) / 1024}

    def metrics(self) -> dict[str, Any]:
        return {"text": self.server.service.metrics.text().decode()}


class Bare:
    """The same model without HTTP: `Model.chat_many` and `Model.embed`."""

    def load(self, model: str, slots: int, embedding: bool = False) -> dict[str, Any]:
        import torch

        import visavis

        torch.set_num_threads(THREADS)
        self.model, self.slots = visavis.load(model), slots
        return {}

    def chat(self, prompts: list[str], new_tokens: int) -> dict[str, Any]:
        started = time.perf_counter()
        replies = self.model.chat_many(prompts, max_sequences=self.slots, max_new_tokens=new_tokens)
        seconds = time.perf_counter() - started
        tokens = sum(reply.usage.completion_tokens for reply in replies)
        return {"seconds": seconds, "tokens": tokens, "texts": [reply.text for reply in replies]}

    def embed(self, texts: list[str]) -> dict[str, Any]:
        started = time.perf_counter()
        vectors = self.model.embed(texts)
        return {"seconds": time.perf_counter() - started, "first": vectors[0].tolist()}


class LlamaCpp:
    """The server of llama.cpp itself, as the xllamacpp wheel starts it."""

    def load(self, model: str, slots: int, embedding: bool = False) -> dict[str, Any]:
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = model
        parameters.hostnames = ["127.0.0.1"]
        parameters.port = 0
        parameters.n_parallel = slots
        parameters.n_ctx = PROMPT_CONTEXT * slots
        parameters.cpuparams.n_threads = THREADS
        parameters.cpuparams_batch.n_threads = THREADS
        parameters.verbosity = 0
        if embedding:
            parameters.embedding = True
            parameters.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_LAST
        self.server = xllamacpp.Server(parameters)
        return {"address": self.server.listening_address}


if __name__ == "__main__":
    serve({"visavis": Visavis, "bare engine": Bare, "llama.cpp": LlamaCpp})
