"""visavis: chat about images, embed and search them, for the LLaVA family of models.

    import visavis
    model = visavis.load("nano")
    print(model.chat("What is in this image?", images=["cat.jpg"]).text)

Names are loaded on first use, so `import visavis` is fast and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visavis.api import Model, Trace, load
    from visavis.errors import VisavisError
    from visavis.generate.streaming import Reply
    from visavis.index import Hit, Index
    from visavis.inputs import Document, Image, Message, Prompt, Text, Video
    from visavis.model.maxsim import maxsim

__version__ = "0.1.0"
__all__ = [
    "Document",
    "Hit",
    "Image",
    "Index",
    "Message",
    "Model",
    "Prompt",
    "Reply",
    "Text",
    "Trace",
    "Video",
    "VisavisError",
    "load",
    "maxsim",
]

_HOMES = {
    "visavis.api": ("Model", "Trace", "load"),
    "visavis.errors": ("VisavisError",),
    "visavis.generate.streaming": ("Reply",),
    "visavis.index": ("Hit", "Index"),
    "visavis.inputs": ("Document", "Image", "Message", "Prompt", "Text", "Video"),
    "visavis.model.maxsim": ("maxsim",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'visavis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
