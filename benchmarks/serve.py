"""What the server costs over the engine, and how it compares with llama.cpp's own server.

    python benchmarks/serve.py [--threads N] [--runs N] [--json FILE] [--quick]

The model is SmolLM2-135M from its Q4_1 GGUF file.

- Over the engine: as many chat answers at a time as the server grows, 512 texts in one request,
  and one text in each of 128 requests of 32 clients.
- One answer beside a flood of embeddings, against the same answer alone.
- Against llama.cpp: 1, 8 and 32 clients, chat tokens and embedded texts per second; both servers
  have as many slots as there are clients.

The clients run on the same cores as the servers.
"""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from _harness import OURS, Options, Report, engines, interleaved, parse_options
from _http_load import Answer, requests_at_once
from _inputs import text

from visavis.checkpoints.load import resolve

SLOTS = 16
CLIENTS = (1, 8, 32)


def main() -> int:
    options = parse_options("serve", __doc__, runs=3)
    report = Report(options, "Server")
    model = str(resolve("smollm2-135m"))
    over_the_engine(report, options, model)
    beside_a_flood(report, options, model)
    for clients in CLIENTS:
        against_llama_cpp(report, options, model, clients)
    return report.finish()


def prompts(number: int, count: int, words: int) -> list[str]:
    """Return texts that no other run has."""
    chance = random.Random(number)
    return [f"{number} {index} {text(chance, words)}" for index in range(count)]


def over_the_engine(report: Report, options: Options, model: str) -> None:
    new_tokens, count = (8, 4) if options.quick else (32, 32)
    num_texts = 64 if options.quick else 512
    with engines("_servers.py", [OURS, "bare engine"], options) as (ours, bare):
        address = ours.ask("load", model=model, slots=SLOTS)["address"]
        bare.ask("load", model=model, slots=SLOTS)
        served_chat(address, 2, prompts(99, 2, 10), 4)
        bare.ask("chat", prompts=prompts(99, 2, 10), new_tokens=4)
        answers: dict[int, list[str]] = {}

        def chat_bare(number: int) -> float:
            found = bare.ask("chat", prompts=prompts(number, count, 30), new_tokens=new_tokens)
            answers[number] = found["texts"]
            return found["tokens"] / found["seconds"]

        def chat_served(number: int) -> float:
            return served_chat(address, SLOTS, prompts(number, count, 30), new_tokens)[0]

        report.add(
            f"chat, {SLOTS} answers at a time of up to {new_tokens} tokens",
            interleaved({OURS: chat_served, "bare engine": chat_bare}, options.runs),
            "tokens/s",
            ratios={"bare engine": 0.95},
        )
        texts = prompts(0, count, 30)
        same = served_chat(address, SLOTS, texts, new_tokens)[1]
        equal = sum(same[one] == answer for one, answer in zip(texts, answers[0], strict=True))
        report.check("chat answers equal to the engine's", equal / count, passed=equal == count)

        def embed_bare(number: int) -> float:
            found = bare.ask("embed", texts=prompts(number, num_texts, 10))
            return num_texts / found["seconds"]

        def embed_served(number: int) -> float:
            body = {"input": prompts(number, num_texts, 10), "encoding_format": "base64"}
            requests = iter([("/v1/embeddings", body)])
            return num_texts / requests_at_once(address, 1, requests, is_ok)

        report.add(
            f"embeddings, {num_texts} texts in one request",
            interleaved({OURS: embed_served, "bare engine": embed_bare}, options.runs),
            "texts/s",
            ratios={"bare engine": 0.90},
        )
        single = num_texts // 4

        def flood(number: int) -> float:
            texts = prompts(number, single, 10)
            requests = (("/v1/embeddings", {"input": one}) for one in texts)
            return single / requests_at_once(address, 32, requests, is_ok)

        def embed_as_many(number: int) -> float:
            return single / bare.ask("embed", texts=prompts(number, single, 10))["seconds"]

        report.add(
            f"embeddings, one text in each of {single} requests of 32 clients",
            interleaved({OURS: flood, "bare engine": embed_as_many}, options.runs),
            "texts/s",
        )


def beside_a_flood(report: Report, options: Options, model: str) -> None:
    """Measure one answer alone, and while 32 clients embed as fast as they can."""
    new_tokens = 16 if options.quick else 64
    with engines("_servers.py", [OURS], options) as (ours,):
        address = ours.ask("load", model=model, slots=SLOTS)["address"]
        served_chat(address, 1, prompts(99, 1, 10), 4)

        def alone(number: int) -> float:
            return served_chat(address, 1, prompts(number, 1, 30), new_tokens)[0]

        def flooded(number: int) -> float:
            stop = threading.Event()

            def bodies() -> Iterator[tuple[str, Any]]:
                for index in itertools.count():
                    if stop.is_set():
                        return
                    yield "/v1/embeddings", {"input": prompts(1000 + index, 8, 10)}

            flood = threading.Thread(
                target=requests_at_once, args=(address, 32, bodies(), lambda answer: None)
            )
            flood.start()
            time.sleep(1)
            rate = alone(number)
            stop.set()
            flood.join()
            return rate

        report.add(
            f"one answer of {new_tokens} tokens beside a flood of embeddings",
            interleaved({OURS: flooded, "without the flood": alone}, options.runs),
            "tokens/s",
            ratios={"without the flood": 0.4},
        )


def against_llama_cpp(report: Report, options: Options, model: str, clients: int) -> None:
    count = 2 * clients if clients > 1 else 4
    new_tokens = 8 if options.quick else 32
    num_texts = 32 if options.quick else 128
    names = [OURS, "llama.cpp"]
    with engines("_servers.py", names, options) as found:
        addresses = [one.ask("load", model=model, slots=clients)["address"] for one in found]

        def chat(address: str) -> Callable[[int], float]:
            return lambda number: served_chat(
                address, clients, prompts(number, count, 30), new_tokens
            )[0]

        measured = {name: chat(one) for name, one in zip(names, addresses, strict=True)}
        for once in measured.values():
            once(99)
        rates = interleaved(measured, options.runs)
        what = f"chat, {clients} clients, up to {new_tokens} tokens"
        report.add(what, rates, "tokens/s", ratios={"llama.cpp": 1})
    with engines("_servers.py", names, options) as found:
        addresses = [
            one.ask("load", model=model, slots=clients, embedding=True)["address"] for one in found
        ]

        def embed(address: str) -> Callable[[int], float]:
            def once(number: int) -> float:
                texts = prompts(number, num_texts, 10)
                requests = (("/v1/embeddings", {"input": one, "model": "model"}) for one in texts)
                return num_texts / requests_at_once(address, clients, requests, is_ok)

            return once

        measured = {name: embed(one) for name, one in zip(names, addresses, strict=True)}
        for once in measured.values():
            once(99)
        rates = interleaved(measured, options.runs)
        what = f"embeddings, {clients} clients, one text a request"
        report.add(what, rates, "texts/s", ratios={"llama.cpp": 3})


def served_chat(
    address: str, clients: int, texts: list[str], new_tokens: int
) -> tuple[float, dict[str, str]]:
    """Return tokens per second over all clients, and the answer to each text."""
    answers: dict[str, str] = {}
    tokens = 0

    def check(answer: Answer) -> None:
        nonlocal tokens
        is_ok(answer)
        found = json.loads(answer.body)
        tokens += found["usage"]["completion_tokens"]
        asked = answer.sent["messages"][0]["content"]
        answers[asked] = found["choices"][0]["message"]["content"]

    def requests() -> Iterator[tuple[str, Any]]:
        for one in texts:
            message = {"role": "user", "content": one}
            body = {"messages": [message], "max_tokens": new_tokens, "temperature": 0}
            yield "/v1/chat/completions", {**body, "model": "model"}

    seconds = requests_at_once(address, clients, requests(), check)
    return tokens / seconds, answers


def is_ok(answer: Answer) -> None:
    assert answer.status == 200, answer.body[:300]


if __name__ == "__main__":
    raise SystemExit(main())
