"""What a checkpoint can be converted to: one row per layout that is written.

Knows which function writes a layout, and what people do with it; writes nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Target:
    """A layout that is written.

    Args:
        title: what people call it.
        function: module below `visavis.checkpoints` and function, `write_x(loaded, folder, …)`.
        usage: code that opens such a folder; `{folder}` stands for its path.
        peer: the program that the layout is of, by its Python package; empty: ours alone.
        library: the name of that program in a model card.
        kinds: it is written in one of several numeric types (`--kind`).
        integers: it holds weights of `--precision int8` and `int4`.
    """

    title: str
    function: str
    usage: str
    peer: str = ""
    library: str = "visavis"
    kinds: bool = False
    integers: bool = False

    @property
    def write(self) -> Callable[..., Any]:
        """The function that writes it."""
        module, _, name = self.function.partition(":")
        found: Callable[..., Any] = getattr(import_module(f"visavis.checkpoints.{module}"), name)
        return found


OURS = 'import visavis\n\nmodel = visavis.load("{folder}")\n'
TARGETS = {
    "native": Target("visavis folder", "native:write_native", OURS, integers=True),
    "transformers": Target(
        "transformers",
        "transformers.export:write_transformers",
        "from transformers import {auto}, {reader}\n\n"
        'model = {auto}.from_pretrained("{folder}")\n'
        'reader = {reader}.from_pretrained("{folder}")\n',
        peer="transformers",
        library="transformers",
    ),
    "llava": Target("LLaVA, original", "llava.export:write_llava", OURS),
    "tinyllava": Target("TinyLLaVA", "tinyllava.export:write_tinyllava", OURS),
    "gguf": Target(
        "GGUF", "gguf.export:write_gguf", OURS, peer="xllamacpp", library="gguf", kinds=True
    ),
    "sentence-transformers": Target(
        "sentence-transformers",
        "native:write_sentence_transformers",
        "from sentence_transformers import SentenceTransformer\n\n"
        'model = SentenceTransformer("{folder}", trust_remote_code=True)  # runs visavis itself\n'
        'vectors = model.encode(["a cat", {{"image": "cat.jpg"}}])\n',
        peer="sentence_transformers",
        library="sentence-transformers",
        integers=True,
    ),
}
