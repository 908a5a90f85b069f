"""How far the probabilities of the next token are from float32: visavis and llama.cpp, one file.

    python benchmarks/kl.py [MODEL.gguf] [--positions N] [--json FILE]

MODEL is SmolLM2-135M's Q4_1 file unless another is named. At N places of `text.txt`, each after up
to 256 tokens, every engine gives the probabilities of all next tokens; visavis in float32 from the
same file is the reference. KL is in nats; perplexity is that of the token that follows. llama.cpp's
probabilities come from its server, one request a place.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import visavis
from visavis.checkpoints.load import resolve
from visavis.model.batch import PackedBatch
from visavis.processing.chat_template import Encoded
from visavis.processing.collate import pack

WINDOW = 256
TEXT = (Path(__file__).parent / "text.txt").read_text(encoding="utf-8")
OURS = {"visavis": "1", "visavis without compiled kernels": "0"}


def prompts(model: visavis.Model, positions: int) -> list[list[int]]:
    """Return the tokens before and at each place, the last one being what follows."""
    ids = model.tokenizer.encode(TEXT, add_special_tokens=False).ids
    places = torch.linspace(WINDOW // 4, len(ids) - 1, positions).long().tolist()
    return [ids[max(0, place - WINDOW) : place + 1] for place in places]


def our_logs(path: str, positions: int, precision: str) -> tuple[Tensor, list[list[int]]]:
    """Return log probabilities [positions, vocab], and the prompts they belong to."""
    model = visavis.load(path, precision=precision, device="cpu")
    found = prompts(model, positions)
    rows = []
    with torch.inference_mode():
        for prompt in found:
            encoded = Encoded(prompt[:-1], [], [False] * (len(prompt) - 1))
            batch: PackedBatch = pack([encoded])
            hidden = model.vlm(batch)[-1][-1:]
            rows.append(model.vlm.decoder.logits(hidden)[0].log_softmax(-1))
    return torch.stack(rows), found


def llamacpp_logs(path: str, found: list[list[int]], vocab: int) -> Tensor:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.hostnames, parameters.port = path, ["127.0.0.1"], 0
    parameters.n_ctx, parameters.n_parallel, parameters.verbosity = 2 * WINDOW, 1, 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(parameters)
    address = server.listening_address.removeprefix("http://")
    rows = torch.full((len(found), vocab), -torch.inf)
    for row, prompt in zip(rows, found, strict=True):
        request = {
            "prompt": prompt[:-1],
            "n_predict": 1,
            "n_probs": vocab,
            "temperature": 1.0,
            "samplers": ["temperature"],
            "cache_prompt": False,
            "post_sampling_probs": False,
        }
        connection = http.client.HTTPConnection(address, timeout=600)
        connection.request(
            "POST", "/completion", json.dumps(request), {"Content-Type": "application/json"}
        )
        answer = json.loads(connection.getresponse().read())
        connection.close()
        top = answer["completion_probabilities"][0]["top_logprobs"]
        row[[one["id"] for one in top]] = torch.tensor([one["logprob"] for one in top])
    return rows.log_softmax(-1)


def measured(logs: Tensor, exact: Tensor, found: list[list[int]]) -> dict[str, Any]:
    kl = (exact.exp() * (exact - logs.clamp(min=-100))).sum(-1)
    follows = torch.tensor([prompt[-1] for prompt in found])
    picked = logs.gather(1, follows[:, None])
    return {
        "kl": float(kl.mean()),
        "largest_kl": float(kl.max()),
        "perplexity": float((-picked.mean()).exp()),
        "same_best": float((logs.argmax(-1) == exact.argmax(-1)).float().mean()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("--positions", type=int, default=64)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)  # a process for each switch
    options = parser.parse_args()
    path = options.model or str(resolve("smollm2-135m"))
    if options.one:
        torch.save(our_logs(path, options.positions, "auto")[0], options.one)
        return 0
    exact, found = our_logs(path, options.positions, "f32")
    results = {"visavis, float32": measured(exact, exact, found)}
    for name, switch in OURS.items():
        kept = Path(f"kl-{switch}.pt").resolve()
        command = [sys.executable, __file__, path, "--positions", str(options.positions)]
        environment = os.environ | {"VISAVIS_NATIVE": switch}
        subprocess.run([*command, "--one", str(kept)], check=True, env=environment)
        results[name] = measured(torch.load(kept, weights_only=True), exact, found)
        kept.unlink()
    results["llama.cpp"] = measured(llamacpp_logs(path, found, exact.shape[1]), exact, found)
    print(f"{Path(path).name}, {options.positions} places")
    print("| engine | KL to float32 | largest | perplexity | same best token |")
    print("|---|---:|---:|---:|---:|")
    for name, one in results.items():
        print(
            f"| {name} | {one['kl']:.5f} | {one['largest_kl']:.4f} | {one['perplexity']:.3f} "
            f"| {one['same_best']:.1%} |"
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
