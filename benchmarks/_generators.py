"""Engines that generate text: visavis, llama.cpp and transformers.

Started by decode.py and prefill.py, one process each; see `_harness.serve`. All get the same token
ids and choose greedily. Times leave out what differs outside the model: HTTP, and for the peers
also the chat template and the tokenizer, which ours includes.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import time
from pathlib import Path
from typing import Any

from _export import export, llama
from _harness import serve
from _inputs import WORDS

THREADS = int(os.environ["OMP_NUM_THREADS"])


class Visavis:
    """The public way, `Model.chat`, taken apart to note the ids; no token ends the answer, so that
    everyone says as many, and nothing is known of earlier prompts."""

    def load(self, model: str, chat_template: str = "") -> dict[str, Any]:
        import dataclasses

        import torch

        import visavis

        torch.set_num_threads(THREADS)
        self.model = visavis.load(model, chat_template=chat_template)
        self.model.specials = dataclasses.replace(self.model.specials, eot_ids=())
        return {}

    def export(self, model: str, folder: str) -> dict[str, Any]:
        export(model, Path(folder))
        return {}

    def prompt(self, tokens: int, number: int) -> dict[str, Any]:
        """Return a question that is exactly `tokens` long with its template, and its ids."""
        words = random.Random(number)
        text = f"Write a very long story, number {number}, about"
        while (missing := tokens - self._count(text)) > 0:
            # no word is longer than twelve bytes, and for some models each byte is a token
            fill = [f" {words.choice(WORDS)}," for _ in range(missing // 12)]
            text += "".join(fill) or next(
                end for end in (" and", ".") if self._count(text + end) <= tokens
            )
        ids = self.model.trace(text).token_ids.tolist()
        assert len(ids) == tokens, f"wanted a prompt of {tokens} tokens, made one of {len(ids)}"
        return {"text": text, "ids": ids}

    def _count(self, text: str) -> int:
        return len(self.model.trace(text).token_ids)

    def run(
        self,
        text: str,
        ids: list[int],
        new_tokens: int,
        *,
        guess: bool = True,
        sampled: bool = False,
    ) -> dict[str, Any]:
        """Answer once: with or without prompt lookup, greedy or sampled at temperature 1."""
        from visavis.generate.engine import Engine
        from visavis.inputs import Prompt

        settings = {"temperature": 1.0, "seed": 0} if sampled else {}
        answer = self.model.ask(Prompt.of(text), max_new_tokens=new_tokens, **settings)
        engine = Engine(self.model.vlm, self.model.image_encoder)
        engine.guesses = engine.guesses and guess
        for _ in engine.run([answer.sequence]):
            answer.update()
        reply = answer.reply
        assert reply.usage.prompt_tokens == len(ids)
        assert reply.usage.completion_tokens == len(answer.sequence.tokens) == new_tokens
        return {
            "prefill_s": reply.timings.prefill_s,
            "decode_s": reply.timings.decode_s,
            "ids": answer.sequence.tokens,
        }

    def several(self, ids: list[int], new_tokens: int, answers: int) -> dict[str, Any]:
        """Let some greedy answers to one prompt grow together; return their tokens per second."""
        from visavis.generate.engine import Engine, GeneratedSequence
        from visavis.processing.chat_template import Encoded
        from visavis.processing.collate import pack

        engine = Engine(self.model.vlm, self.model.image_encoder, max_sequences=answers)
        sequences = []
        for number in range(answers):
            batch = pack([Encoded([*ids[:-1], ids[number]], [], [False] * len(ids))])
            choose = lambda scores: int(scores.argmax())  # noqa: E731
            sequences.append(GeneratedSequence(batch, choose, new_tokens, frozenset()))
            engine.add(sequences[-1])
        while engine.waiting:
            engine.step()
        before, start = sum(len(one.tokens) for one in sequences), time.perf_counter()
        while engine.busy:
            engine.step()
        seconds = time.perf_counter() - start
        return {"rate": (sum(len(one.tokens) for one in sequences) - before) / seconds}


class LlamaCpp:
    """The xllamacpp wheel's server on the loopback device; times are those it takes itself."""

    def load(self, model: str, slots: int = 1) -> dict[str, Any]:
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = model
        parameters.hostnames = ["127.0.0.1"]
        parameters.port = 0
        parameters.n_ctx = 2048 * slots
        parameters.n_parallel = slots
        parameters.cpuparams.n_threads = THREADS
        parameters.cpuparams_batch.n_threads = THREADS
        parameters.verbosity = 0
        self.server = xllamacpp.Server(parameters)
        self.address = self.server.listening_address.removeprefix("http://")
        return {}

    def run(
        self,
        text: str,
        ids: list[int],
        new_tokens: int,
        *,
        guess: bool = False,
        sampled: bool = False,
    ) -> dict[str, Any]:
        assert not guess
        request = {
            "prompt": ids,
            "n_predict": new_tokens,
            "temperature": 1.0 if sampled else 0,
            "samplers": ["temperature"],  # nothing before the choice of the best token
            "cache_prompt": False,
            "ignore_eos": True,
            "return_tokens": True,
        }
        connection = http.client.HTTPConnection(self.address, timeout=600)
        connection.request(
            "POST", "/completion", json.dumps(request), {"Content-Type": "application/json"}
        )
        answer = json.loads(connection.getresponse().read())
        connection.close()
        timings = answer["timings"]
        assert timings["prompt_n"] == len(ids) and timings["predicted_n"] == new_tokens, timings
        return {
            "prefill_s": timings["prompt_ms"] / 1000,
            "decode_s": timings["predicted_ms"] / 1000,
            "ids": answer["tokens"],
        }

    def several(self, ids: list[int], new_tokens: int, answers: int) -> dict[str, Any]:
        """Ask for some answers at a time; the reading of prompts does not count."""
        from concurrent.futures import ThreadPoolExecutor

        start = time.perf_counter()
        with ThreadPoolExecutor(answers) as pool:
            prompts = [[*ids[:-1], ids[number]] for number in range(answers)]
            done = list(pool.map(lambda prompt: self.run("", prompt, new_tokens), prompts))
        seconds = time.perf_counter() - start - max(one["prefill_s"] for one in done)
        return {"rate": answers * (new_tokens - 1) / seconds}


class Transformers:
    """`generate` in bfloat16: of a GGUF file as transformers itself dequantises it, else of the
    folder that `_export.py` wrote."""

    def load(self, model: str) -> dict[str, Any]:
        import copy

        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(THREADS)
        torch.set_grad_enabled(False)
        path = Path(model)
        self.exact = (
            llama(model)
            if path.is_dir()
            else AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32
            ).eval()
        )
        self.model = copy.deepcopy(self.exact).to(torch.bfloat16)
        for choice in ("eos_token_id", "pad_token_id"):  # always the full number of tokens
            setattr(self.model.generation_config, choice, None)
        return {}

    def run(self, text: str, ids: list[int], new_tokens: int) -> dict[str, Any]:
        import torch

        clock = Clock()
        started = time.perf_counter()
        tokens = self.model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=clock,
        )
        answer = tokens[0, len(ids) :].tolist()
        assert len(answer) == new_tokens
        first = clock.times[1]  # the prompt itself is put first
        return {
            "prefill_s": first - started,
            "decode_s": clock.times[-1] - first,
            "ids": answer,
        }

    def judge(self, ids: list[int], answer: list[int]) -> dict[str, Any]:
        """Return the largest lead, in logits, of the best token over the chosen one.

        Each choice is judged after the engine's own earlier choices, with float32 weights: an
        engine that computes the same chooses another token only where two are nearly equal.
        """
        import torch

        logits = self.exact(torch.tensor([ids + answer[:-1]])).logits[0, len(ids) - 1 :]
        return _lead(logits, answer)


class Exact:
    """A judge for files that transformers cannot take: our own weights in float32."""

    def load(self, model: str, chat_template: str = "") -> dict[str, Any]:
        import torch

        import visavis

        torch.set_num_threads(THREADS)
        self.model = visavis.load(model, chat_template=chat_template, precision="f32", device="cpu")
        return {}

    def judge(self, ids: list[int], answer: list[int]) -> dict[str, Any]:
        import torch

        logits = torch.from_numpy(self.model.trace(ids + answer[:-1]).logits)[len(ids) - 1 :]
        return _lead(logits, answer)


def _lead(logits: Any, answer: list[int]) -> dict[str, Any]:
    chosen = logits[range(len(answer)), answer]
    return {"lead": float((logits.amax(-1) - chosen).max())}


class Clock:
    """A streamer that notes when each token arrives."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


if __name__ == "__main__":
    serve({"visavis": Visavis, "llama.cpp": LlamaCpp, "transformers": Transformers, "exact": Exact})
