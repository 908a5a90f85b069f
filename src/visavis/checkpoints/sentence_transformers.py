"""The native format with the files by which sentence-transformers opens it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from visavis.checkpoints.checkpoint import Checkpoint, Written, write_json
from visavis.checkpoints.native import NativeFormat, write_native

MODULE = "visavis.interop.sentence_transformers.VisavisModule"


class SentenceTransformersFormat(NativeFormat):
    """visavis' own folder with the files by which sentence-transformers opens it."""

    title = "sentence-transformers"
    target = "sentence-transformers"
    usage = (
        "from sentence_transformers import SentenceTransformer\n\n"
        'model = SentenceTransformer("{folder}", trust_remote_code=True)  # runs visavis itself\n'
        'vectors = model.encode(["a cat", {{"image": "cat.jpg"}}])\n'
    )
    peer = "sentence_transformers"
    library = "sentence-transformers"

    @classmethod
    def save(
        cls, checkpoint: Checkpoint, folder: Path, *, kind: str = "", progress: bool = False
    ) -> Written:
        settings: dict[str, Any] = {
            "model_type": "SentenceTransformer",
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        }
        modules = [{"idx": 0, "name": "0", "path": "", "type": MODULE}]
        files = [
            write_json(folder / "modules.json", modules),
            write_json(folder / "config_sentence_transformers.json", settings),
        ]
        written = write_native(checkpoint, folder, progress=progress)
        return Written([*files, *written.files], written.lost)
