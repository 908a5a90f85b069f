"""Many clients for a long time: chat and embeddings mixed, through the limits that are the default.

    python benchmarks/serve_load.py [--clients N] [--minutes N] [--model MODEL] [--threads N]
                                    [--json FILE]

Half of the clients chat, half embed, each its next request when it has an answer; a client that is
refused with status 429 waits as long as Retry-After says. Prints the number of answers by status,
the median and the 99th percentile of the seconds to an answer in each quarter of the time, and the
server's memory, and exits with 1 if anything but 200 and 429 came.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from _harness import FOLDER, OURS, Engine, machine, usable_cores, versions
from _http_load import Connection
from _inputs import text

QUARTERS = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--threads", type=int, default=len(usable_cores()))
    parser.add_argument("--json", type=Path, default=FOLDER / "serve_load.json")
    options = parser.parse_args()
    server = Engine("_servers.py", OURS, options.threads)
    try:
        address = server.ask("load", model=options.model, slots=16)["address"]
        found = asyncio.run(load(address, options.clients, options.minutes * 60, server))
        metrics = server.ask("metrics")["text"]
    finally:
        server.close()
    found |= {
        "command": " ".join(["python", "benchmarks/serve_load.py", *sys.argv[1:]]),
        "clients": options.clients,
        "minutes": options.minutes,
        "model": options.model,
        "machine": machine(),
        "versions": versions(),
        "batches": _metric(metrics, "visavis_batches_total"),
        "batch_items": _metric(metrics, "visavis_batch_items_total"),
    }
    print(json.dumps({name: found[name] for name in found if name != "versions"}, indent=1))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if set(found["statuses"]) <= {"200", "429"} and not found["broken"] else 1


async def load(address: str, clients: int, seconds: float, server: Engine) -> dict[str, Any]:
    statuses: Counter[str] = Counter()
    broken: Counter[str] = Counter()
    taken: dict[str, list[tuple[float, float]]] = {"chat": [], "embeddings": []}
    memory: list[float] = []
    started = time.perf_counter()
    until = started + seconds

    async def client(number: int) -> None:
        chance = random.Random(number)
        connection = Connection(address)
        kind = "chat" if number % 2 else "embeddings"
        while time.perf_counter() < until:
            body: dict[str, Any]
            if kind == "chat":
                message = {"role": "user", "content": text(chance, 20)}
                path, body = "/v1/chat/completions", {"messages": [message], "max_tokens": 32}
            else:
                path, body = "/v1/embeddings", {"input": text(chance, 12)}
            try:
                answer = await connection.post(path, body)
            except (OSError, EOFError) as error:
                broken[type(error).__name__] += 1
                connection.close()
                continue
            statuses[str(answer.status)] += 1
            if answer.status == 200:
                taken[kind].append((time.perf_counter() - started, answer.seconds))
            elif answer.status == 429:
                await asyncio.sleep(answer.retry_after)
        connection.close()

    async def watch() -> None:
        while time.perf_counter() < until:
            memory.append(round(server.ask("resident")["mb"], 1))
            await asyncio.sleep(max(1.0, seconds / 40))

    await asyncio.gather(watch(), *map(client, range(clients)))
    return {
        "statuses": dict(statuses),
        "broken": dict(broken),
        "memory_mb": memory,
        "seconds": {
            kind: [_percentiles(times, quarter, seconds) for quarter in range(QUARTERS)]
            for kind, times in taken.items()
        },
    }


def _percentiles(times: list[tuple[float, float]], quarter: int, total: float) -> dict[str, Any]:
    """Return how long answers took that came in one quarter of the time."""
    first, last = total * quarter / QUARTERS, total * (quarter + 1) / QUARTERS
    inside = [seconds for at, seconds in times if first <= at < last]
    if not inside:
        return {"answers": 0}
    p50, p99 = np.percentile(inside, [50, 99])
    return {"answers": len(inside), "p50": round(float(p50), 3), "p99": round(float(p99), 3)}


def _metric(text_of_all: str, name: str) -> float:
    return sum(
        float(line.rpartition(" ")[2])
        for line in text_of_all.splitlines()
        if line.startswith((name + "{", name + " "))
    )


if __name__ == "__main__":
    raise SystemExit(main())
