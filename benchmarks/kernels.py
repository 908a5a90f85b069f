"""One decode step and one prefill with each instruction set, and with PyTorch's kernels.

    python benchmarks/kernels.py [MODEL] [--threads N] [--runs N] [--json FILE]

MODEL is SmolLM2-135M's Q4_1 file unless another is named. Steps of 1 to 16 sequences, each after 64
tokens, and a prompt of 512; the instruction sets take turns, a process each. Times are the shortest
of N, in processor time with one thread, which other processes disturb less than the clock, and by
the clock with several. The bandwidth of reading, by a sum over 400 MB, is measured in the same
processes; *share* is the speed at which a step of one sequence reads the weights, over that.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

BATCHES = (1, 2, 4, 8, 16)
PAST, PROMPT = 64, 512
SWITCHES = ("avx512", "avx2", "neon", "portable", "0")


def measure(model_name: str, threads: int, runs: int) -> dict[str, float]:
    import torch

    import visavis
    from visavis.bench import decoder_weights
    from visavis.model.attention import SequenceLayout
    from visavis.model.kv_cache import KVCache
    from visavis.model.quantized_linear import packed_kernels

    torch.set_num_threads(threads)
    decoder = visavis.load(model_name, device="cpu").vlm.decoder
    _, weight_bytes = decoder_weights(visavis.load(model_name, device="cpu"))
    clock = time.process_time if threads == 1 else time.perf_counter

    def shortest(call: Callable[[], object]) -> float:
        times = []
        for _ in range(runs):
            start = clock()
            call()
            times.append(clock() - start)
        return min(times)

    def step(caches: tuple[KVCache, ...], ids: torch.Tensor) -> torch.Tensor:
        for cache in caches:
            cache.length = PAST
        x, places = decoder.embed_tokens(ids), torch.full((len(ids),), PAST)
        if decoder.compiled is not None:
            return decoder.compiled.scores(x, places, caches)
        with packed_kernels():
            layout = SequenceLayout((1,) * len(caches), caches)
            return decoder.logits(decoder(x, places, layout)[-1])

    def prefill() -> object:
        cache = KVCache(decoder.config, dtype=decoder.dtype, capacity=PROMPT)
        layout = SequenceLayout((PROMPT,), (cache,))
        return decoder(torch.randn(PROMPT, decoder.config.width), torch.arange(PROMPT), layout)

    found = {}
    with torch.inference_mode():
        numbers = torch.ones(100_000_000)
        found["read GB/s"] = numbers.nbytes / 1e9 / shortest(numbers.sum)
        for size in BATCHES:
            caches = tuple(
                KVCache(decoder.config, dtype=decoder.dtype, capacity=2 * PAST) for _ in range(size)
            )
            for cache in caches:
                for store in (*cache.keys, *cache.values):
                    store.normal_()
            ids = torch.arange(100, 100 + size)
            found[f"step of {size}, ms"] = 1000 * shortest(lambda c=caches, i=ids: step(c, i))
        found[f"prompt of {PROMPT}, ms"] = 1000 * shortest(prefill)
    found["share"] = weight_bytes / 1e6 / found["step of 1, ms"] / found["read GB/s"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.model, options.threads, options.runs)))
        return 0
    words = [options.model, "--threads", str(options.threads), "--runs", str(options.runs), "--one"]
    rows = {}
    for _ in range(2):  # in turns
        for switch in SWITCHES:
            environment = os.environ | {
                "VISAVIS_NATIVE": switch,
                "OMP_NUM_THREADS": str(options.threads),
            }
            command = [sys.executable, __file__, *words]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if "does not run these kernels" in done.stderr:
                continue
            if done.returncode:
                raise SystemExit(done.stderr)
            found, known = json.loads(done.stdout.splitlines()[-1]), rows.get(switch)
            rows[switch] = {
                name: value if known is None else (min if "ms" in name else max)(value, known[name])
                for name, value in found.items()
            }
    names = list(next(iter(rows.values())))
    print(f"{options.model}, {options.threads} thread(s), shortest of 2 x {options.runs}")
    print("| kernels | " + " | ".join(names) + " | tokens/s of 8 over 1 |")
    print("|---|" + "---:|" * (len(names) + 1))
    for switch, found in rows.items():
        label = "PyTorch" if switch == "0" else switch
        ratio = 8 * found["step of 1, ms"] / found["step of 8, ms"]
        values = " | ".join(f"{found[name]:.2f}" for name in names)
        print(f"| {label} | {values} | {ratio:.1f} |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
