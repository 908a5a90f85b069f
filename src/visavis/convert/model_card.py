"""README.md of a converted checkpoint: what it is, where it is from, how it is used.

Says only what the files say. A licence that no file of the source names is left to be filled in.
"""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

from visavis.checkpoints.checkpoint import Checkpoint
from visavis.checkpoints.formats import TARGETS
from visavis.checkpoints.gguf.reader import open_model
from visavis.checkpoints.tensor_files import MAX_JSON_BYTES

LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md")
UNKNOWN = (
    "The source's files do not say. **Fill this in** from where you have the source before you "
    "pass this folder on: a conversion changes nothing about what its makers allow."
)


def model_card(
    loaded: Checkpoint, source: Path, named: str, to: str, stored: str, lost: list[str]
) -> str:
    """Return the text of README.md.

    Args:
        source: the files that were converted.
        named: what they are called, without folders of this machine.
        stored: what the weights are stored in.
        lost: settings that the layout has no place for.
    """
    target, licence = TARGETS[to], source_licence(source)
    config = loaded.vlm.config
    vision, decoder, text = config.tower is not None, config.decoder, config.text_tower
    parts = {
        "language model": f"{decoder.num_layers} layers × {decoder.width}"
        if config.has_decoder
        else None,
        "vision tower": config.tower.kind if config.tower else None,
        "connector": config.connector.kind if config.connector else None,
        "text tower": f"{text.kind}, {text.num_layers} layers" if text else None,
        "embedding head": f"{config.head.dim} dimensions" if config.head else None,
    }
    names = {
        "auto": "AutoModelForImageTextToText" if vision else "AutoModelForCausalLM",
        "reader": "AutoProcessor" if vision else "AutoTokenizer",
    }
    task = "image-text-to-text" if vision else "text-generation"
    if not config.has_decoder:
        names["auto"], task = "AutoModel", "zero-shot-image-classification"
    usage = target.usage.format(folder=".", **names).rstrip()
    option = "--kind" if target.has_gguf_types else "--precision"
    front = [
        "---",
        *([f"license: {licence}"] if licence else []),
        f"library_name: {target.library}",
        f"pipeline_tag: {task}",
        "---",
    ]
    lines = [
        *front,
        f"# {loaded.name}",
        "",
        f"Converted by visavis {version('visavis')} to the layout of {target.title}. It was not "
        "trained further: what the model can and cannot do is what its source can and cannot.",
        "",
        "| | |",
        "|---|---|",
        f"| source | `{named}`, fingerprint `{loaded.fingerprint}` |",
        *(f"| {name} | {what} |" for name, what in parts.items() if what),
        f"| weights in | {stored} |",
        f"| made with | `visavis convert {named} OUT --to {to} {option} {stored}` |",
        "",
        "```python",
        usage,
        "```",
        "",
    ]
    if lost:
        lines += [
            "## What this layout has no place for",
            "",
            *(f"- {setting}" for setting in lost),
            "",
        ]
    lines += ["## Licence", "", f"`{licence}`, as the source's files say." if licence else UNKNOWN]
    return "\n".join(lines) + "\n"


def source_licence(source: Path) -> str:
    """Return the licence that a source's model card or GGUF metadata names, empty if none does."""
    if source.is_file():
        return str(open_model(source)[0].metadata.get("general.license", ""))
    card = source / "README.md"
    if not card.is_file() or card.stat().st_size > MAX_JSON_BYTES:
        return ""
    text = card.read_text(encoding="utf-8", errors="replace")
    front = re.match(r"---\s*\n(.*?)\n---\s*\n", text, re.DOTALL)
    found = re.search(r"^licen[sc]e:\s*['\"]?([\w.+-]+)", front[1], re.MULTILINE) if front else None
    return found[1] if found else ""
