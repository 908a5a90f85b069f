"""What fewer bits cost: perplexity of a fixed text, and cosine of vectors, by precision and type.

    python benchmarks/precision.py [--threads N] [--json FILE]

Takes SmolLM2-135M and nano. Both come from 4-bit blocks, which int4 would give back as they are and
so tell nothing. So channels change places first: within each sum, which changes no result, but
groups are of other numbers then. The text, `text.txt`, was written for this and belongs to nobody
(CC0): no model has been trained on it. Perplexity is taken as prompts are read. Answers are made by
other kernels; how far they are from that is one number more (KL, in nats). Two minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import visavis
from visavis.api import Model
from visavis.checkpoints import quantize
from visavis.checkpoints.checkpoint import Checkpoint
from visavis.checkpoints.gguf.export import write_gguf
from visavis.checkpoints.load import load_checkpoint
from visavis.checkpoints.native import write_native
from visavis.model.quantized_linear import packed_kernels
from visavis.processing.chat_template import Encoded
from visavis.processing.collate import pack

WINDOW = 256  # tokens
PRECISIONS = ("f32", "bf16", "int8", "int4")
KINDS = ("Q8_0", "Q6_K", "Q5_0", "Q4_K_M", "Q4_0")
TEXT = (Path(__file__).parent / "text.txt").read_text(encoding="utf-8")
TEXTS = TEXT.split("\n\n")
COLUMNS = "model | weights | memory of the decoder | perplexity of the type | perplexity"
COLUMNS += " | KL of answers | cosine | least"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="report file")
    options = parser.parse_args()
    quantize.MAX_DENSE_WEIGHTS = 0  # small models are measured as large ones
    torch.set_num_threads(options.threads)
    print(f"| {COLUMNS} |\n|---|---|{'---:|' * 6}")
    rows = []
    for name in ("smollm2-135m", "nano"):
        with tempfile.TemporaryDirectory() as folder:
            for row in measured(name, Path(folder)):
                rows.append(row)
                print(line(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def measured(name: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each precision, and each type that the model can be written in."""
    loaded = load_checkpoint(name, precision="f32", device="cpu")
    before = vectors(Model.of(loaded))
    order = shuffle(loaded)
    before = before if loaded.vlm.head else before[:, order]
    (folder / "f32").mkdir()
    write_native(loaded, folder / "f32")
    exact = visavis.load(folder / "f32", precision="f32", device="cpu")
    expected = vectors(exact)
    assert torch.cosine_similarity(before, expected).min() > 0.9999, "channels moved wrongly"
    places = [(precision, folder / "f32", precision) for precision in PRECISIONS]
    if loaded.vlm.head is None:
        files = {kind: write_gguf(loaded, folder / f"{kind}.gguf", kind=kind)[0] for kind in KINDS}
        places += [(kind, file, "auto") for kind, file in files.items()]
    for label, place, precision in places:
        model = visavis.load(place, precision=precision, device="cpu")
        cosine = torch.cosine_similarity(vectors(model), expected)
        row = {
            "model": name,
            "weights": label,
            "bytes": weight_bytes(model),
            "perplexity": perplexity(model),
            "divergence": divergence(model),
            "cosine": float(cosine.median()),
            "least": float(cosine.min()),
        }
        if label in KINDS:  # what the type itself costs, whoever computes with it
            whole = visavis.load(place, precision="f32", device="cpu")
            row["type"] = perplexity(whole)
        yield row


def shuffle(loaded: Checkpoint) -> Tensor:
    """Let residual and feed-forward channels change places, all that meet alike; return where those
    of the residual stream came from."""
    generator = torch.Generator().manual_seed(0)
    vlm, decoder = loaded.vlm, loaded.vlm.decoder
    order = torch.randperm(decoder.config.width, generator=generator)
    columns: list[Any] = [decoder.embed]
    rows: list[Any] = [decoder.norm]
    for block in decoder.blocks:
        columns += [block.qkv, block.up]
        rows += [block.attn_norm, block.ffn_norm, block.out, block.down]
        inner = torch.randperm(block.down.in_features, generator=generator)
        block.down.weight.data = block.down.weight[:, inner]
        block.up.weight.data = block.up.weight.unflatten(0, (2, -1))[:, inner].flatten(0, 1)
    if vlm.connector is not None:
        *_, last = (m for m in vlm.connector.modules() if isinstance(m, nn.Linear))
        rows.append(last)
    if vlm.head is not None:
        kept = vlm.head.text.weight.unflatten(1, (-1, len(order)))
        vlm.head.text.weight.data = kept[:, :, order].flatten(1)
    for module in columns:
        module.weight.data = module.weight[:, order].contiguous()
    for module in rows:
        module.weight.data = module.weight[order].contiguous()
        if getattr(module, "bias", None) is not None:
            module.bias.data = module.bias[order]
    decoder.head.weight = decoder.embed.weight  # both models tie them
    return order


def vectors(model: Model) -> Tensor:
    return torch.from_numpy(model.embed(TEXTS))


def perplexity(model: Model) -> float:
    """Return that of whole windows of the text, each read without what stands before it."""
    found = windows(model)
    losses = [
        nn.functional.cross_entropy(scores(model, window)[:-1], torch.tensor(window[1:]))
        for window in found
    ]
    return math.exp(torch.stack(losses).mean())


def divergence(model: Model) -> float:
    """Return the mean KL of what is said next, computed as answers are, from that of reading."""
    window = windows(model)[0]
    read = scores(model, window).log_softmax(-1)
    with packed_kernels():
        said = scores(model, window).log_softmax(-1)
    return float((read.exp() * (read - said)).sum(-1).mean())


def windows(model: Model) -> list[list[int]]:
    ids = model.tokenizer.encode(TEXT).ids
    return [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW + 1, WINDOW)]


def scores(model: Model, window: list[int]) -> Tensor:
    batch = pack([Encoded(window, [], [False] * len(window))])
    with torch.inference_mode():
        return model.vlm.decoder.logits(model.vlm(batch)[-1])


def weight_bytes(model: Model) -> int:
    """Return the memory of a decoder's weights."""
    decoder = model.vlm.decoder
    tensors = [*decoder.parameters(), *decoder.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def line(row: dict[str, Any]) -> str:
    kind = f"{row['type']:.3f}" if "type" in row else ""
    return (
        f"| {row['model']} | {row['weights']} | {row['bytes'] / 1e6:.0f} MB | {kind} | "
        f"{row['perplexity']:.3f} | {row['divergence']:.4f} | {row['cosine']:.4f} | "
        f"{row['least']:.4f} |"
    )


if __name__ == "__main__":
    main()
