"""Features of a frozen tower, computed once and kept on disk by the content of each picture.

    <folder>/<tower digest>/features.f16    rows of [P, W] float16, appended
    <folder>/<tower digest>/rows.txt        one content hash per row, appended after its features

A crash leaves at most some features without a hash; opening cuts them off. A digest of the tower's
weights and of the image processor names the folder, so another tower never reads these rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from visavis.model.config import Qwen2VLTowerConfig
from visavis.model.vlm import VLM
from visavis.processing.images import (
    ImageProcessorConfig,
    content_hash,
    decode_image,
    process_image,
)

TOWER_BATCH = 32


class TowerFeatures:
    """A growing store of tower features; rows are numbered and never change."""

    def __init__(self, folder: Path, vlm: VLM, processor: ImageProcessorConfig) -> None:
        assert vlm.config.tower is not None and vlm.tower is not None
        assert not isinstance(vlm.config.tower, Qwen2VLTowerConfig), "its features vary in number"
        self.vlm, self.processor = vlm, processor
        self.shape = (vlm.config.tower.grid**2, vlm.config.tower.width)  # P, W
        self.folder = folder / tower_digest(vlm, processor)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.data_path, self.rows_path = self.folder / "features.f16", self.folder / "rows.txt"
        self.row_bytes = 2 * self.shape[0] * self.shape[1]
        self._open()

    def _open(self) -> None:
        """Read the hashes; cut off whatever a crash left half-written in either file."""
        for path in (self.data_path, self.rows_path):
            path.touch()
        text = self.rows_path.read_text()
        hashes = text[: text.rfind("\n") + 1].split()
        complete = min(len(hashes), self.data_path.stat().st_size // self.row_bytes)
        with self.data_path.open("r+b") as file:
            file.truncate(complete * self.row_bytes)
        self.rows = {key: number for number, key in enumerate(hashes[:complete])}
        self.rows_path.write_text("".join(f"{key}\n" for key in hashes[:complete]))

    def add(
        self,
        images: Sequence[bytes],
        *,
        flip: bool = False,
        report: Callable[[int], None] = lambda count: None,
    ) -> list[int]:
        """Return the row of each picture, computing what is not stored yet.

        Args:
            flip: mirror the pictures left to right first (another row than the plain one).
            report: told how many pictures were just computed.
        """
        keys = [content_hash(image) + ("-flip" if flip else "") for image in images]
        todo = {key: image for key, image in zip(keys, images, strict=True) if key not in self.rows}
        pairs = list(todo.items())
        for start in range(0, len(pairs), TOWER_BATCH):
            chunk = pairs[start : start + TOWER_BATCH]
            pixels = np.stack(
                [process_image(decode_image(image), self.processor) for _, image in chunk]
            )
            if flip:
                pixels = pixels[..., ::-1].copy()
            self.put([key for key, _ in chunk], self._compute(torch.from_numpy(pixels)))
            report(len(chunk))
        return [self.rows[key] for key in keys]

    @torch.inference_mode()
    def _compute(self, pixels: Tensor) -> np.ndarray:
        assert self.vlm.tower is not None
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.autocast(
            "cpu", dtype=torch.bfloat16, enabled=self.vlm.decoder.dtype.itemsize < 4
        ):
            features = self.vlm.tower_features(pixels)
        return features.float().half().numpy()

    def put(self, keys: list[str], features: np.ndarray) -> None:
        """Append rows [N, P, W], float16, under new keys."""
        with self.data_path.open("ab") as file:
            file.write(features.tobytes())
        with self.rows_path.open("a") as file:
            file.writelines(f"{key}\n" for key in keys)
        for key in keys:
            self.rows[key] = len(self.rows)

    def __getitem__(self, rows: Sequence[int]) -> Tensor:
        """Return features of rows, float32 [N, P, W]."""
        stored = np.memmap(self.data_path, np.float16, "r", shape=(len(self.rows), *self.shape))
        return torch.from_numpy(stored[list(rows)].astype(np.float32))

    def means(self, rows: Sequence[int]) -> Tensor:
        """Return the mean over patches of each row, float32 [N, W]."""
        chunks = [self[rows[i : i + 256]].mean(1) for i in range(0, len(rows), 256)]
        return torch.cat(chunks)


def tower_digest(vlm: VLM, processor: ImageProcessorConfig) -> str:
    """Return 16 hex digits of the tower's weights and the processor's settings."""
    assert vlm.tower is not None
    digest = hashlib.sha256(repr(sorted(processor.to_dict().items())).encode())
    for name, tensor in vlm.tower.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
