"""Which parameters a stage trains, and the table that says so."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from visavis.model.vlm import VLM


def trainable_groups(
    vlm: VLM, parts: Iterable[str], *, lora_from: int = 0
) -> dict[str, list[nn.Parameter]]:
    """Freeze everything but the named parts; return their parameters.

    Args:
        parts: of "connector", "head" and "lora".
        lora_from: only adapters of this block and later ones; hidden states below stay.
    """
    vlm.requires_grad_(False)
    found: dict[str, list[nn.Parameter]] = {}
    for part in parts:
        if part == "lora":
            blocks = vlm.decoder.blocks[lora_from:]
            named = [p for n, p in blocks.named_parameters() if ".lora_" in n]
        else:
            named = list(getattr(vlm, part).parameters())
        for parameter in named:
            parameter.requires_grad_(True)
        found[part] = named
    return found


def trainable_table(vlm: VLM) -> list[tuple[str, int, int]]:
    """Return (part, parameters, of them trainable) for tower, connector, decoder and head."""
    rows = []
    for name, module in vlm.named_children():
        counts = [(p.numel(), p.requires_grad) for p in module.parameters()]
        rows.append((name, sum(n for n, _ in counts), sum(n for n, on in counts if on)))
    return rows
