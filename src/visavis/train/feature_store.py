"""On-disk cache of the frozen vision tower's output, computed once per image and keyed by content.

    <folder>/<tower>/<shard>.f16     features [P, W] of one image after another, float16
    <folder>/<tower>/<shard>.rows    "row key crc32", a line for each, written after its features

Shards are append-only and each process writes its own, so a reader never sees an incomplete image
and a killed run loses at most the last few. `<tower>` names the tower's weights, the hidden state
that is read, and the image preprocessing: another tower never reads these. Rows that fail their
checksum are computed again. For images of one view only.
"""

from __future__ import annotations

import hashlib
import re
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import RLock
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from visavis.errors import InputError, TrainError
from visavis.inputs import Image, Prompt
from visavis.model.vlm import TOWER_BATCH, VLM
from visavis.processing.config import ImageProcessorConfig
from visavis.processing.image_encoder import decode_ahead
from visavis.processing.image_processor import image_processor
from visavis.processing.images import content_hash, decode_image
from visavis.processing.resize import process_image

MAX_BYTES = 100 * 10**9
LINE = re.compile(r"^(\d+) (\S+) ([0-9a-f]{8})\n", re.MULTILINE)  # a whole one, of `.rows`
CHUNK = 32  # pictures that are decoded, and written, together


Named = tuple[Image, str]  # with the id of its sample, for messages


class FeaturePlace(NamedTuple):
    """Where an image's features lie."""

    shard: str
    row: int
    checksum: int


class FeatureStore:
    """A growing store of tower features (`data_loader.Features`).

    Args:
        half: compute a float32 tower in bfloat16, several times faster where the processor has
            instructions for it; features differ by a few percent, which training does not notice.
        max_bytes: the most that is kept on disk.
        threads: of decoding.

    Raises:
        TrainError: the model sees an image as several views.
    """

    def __init__(
        self,
        folder: Path,
        vlm: VLM,
        processor: ImageProcessorConfig,
        *,
        half: bool = False,
        max_bytes: int = MAX_BYTES,
        threads: int = 2,
    ) -> None:
        rule = image_processor(processor)
        if rule.needs_size:
            raise TrainError(
                f"this model sees a picture as several views ({type(rule).__name__}), and the "
                "feature cache keeps one; set feature_cache to false in the recipe, or take a "
                "model without."
            )
        assert vlm.config.tower is not None
        self.vlm, self.processor, self.max_bytes = vlm, processor, max_bytes
        self.shape = (vlm.config.features_per_image, vlm.config.tower.width)  # P, W
        self.row_bytes = 2 * self.shape[0] * self.shape[1]
        self.half = half
        self.folder = folder / (tower_digest(vlm, processor) + ("-bf16" if half else ""))
        self.own = uuid.uuid4().hex  # the shard that this process writes
        self.num_own = 0
        self.pool = ThreadPoolExecutor(threads)
        self.lock = RLock()
        self.maps: dict[str, np.memmap] = {}
        self.known_means: dict[str, Tensor] = {}  # by key, each [W]
        self.refresh()

    def refresh(self) -> None:
        """Read what lies there, other processes' work included."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.places: dict[str, FeaturePlace] = {}
        self.num_bytes = 0
        for path in sorted(self.folder.glob("*.rows")):
            data = path.with_suffix(".f16")
            size = data.stat().st_size if data.is_file() else 0
            self.num_bytes += size
            for row, key, checksum in LINE.findall(path.read_text(encoding="utf-8")):
                if (int(row) + 1) * self.row_bytes <= size:
                    self.places[key] = FeaturePlace(path.stem, int(row), int(checksum, 16))

    def of(self, prompts: Sequence[Prompt], ids: Sequence[str]) -> Tensor:
        """Return features [N, P, W] of all images of prompts, in order, float32.

        Args:
            ids: of the sample that each prompt is of.

        Raises:
            TrainError: one of them is a video, or cannot be read; the message names the sample.
        """
        pictures, owners = [], []
        for prompt, id in zip(prompts, ids, strict=True):
            for visual in prompt.visuals:
                if not isinstance(visual, Image):
                    raise TrainError(
                        f"the sample {id!r} holds a video, and the feature cache keeps pictures "
                        "only; set feature_cache to false in the recipe, or take its source out."
                    )
                pictures.append(visual)
                owners.append(id)
        return self.get(pictures, owners)

    def get(self, images: Sequence[Image], ids: Sequence[str], *, flip: bool = False) -> Tensor:
        """Return features [N, P, W] of images, float32; those not stored yet are computed.

        Args:
            ids: of their samples, for messages.
            flip: mirror the images left to right first.

        Raises:
            TrainError: an image cannot be read, or the store is full.
        """
        with self.lock:
            keys = _keys(images, ids, flip)
            found = {key: self._read(key) for key in dict.fromkeys(keys)}
            named = zip(keys, zip(images, ids, strict=True), strict=True)
            absent = {key: one for key, one in named if found[key] is None}
            for computed in self._compute(absent, flip):
                found |= computed
            rows = [row for key in keys if (row := found[key]) is not None]
            return torch.from_numpy(np.stack(rows).astype(np.float32))

    def add(
        self,
        images: Sequence[Image],
        ids: Sequence[str],
        *,
        flip: bool = False,
        report: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Compute the features of what is not stored yet.

        Args:
            report: told of how many images they were just computed.
        """
        with self.lock:
            named = zip(_keys(images, ids, flip), zip(images, ids, strict=True), strict=True)
            absent = {key: one for key, one in named if key not in self.places}
            for computed in self._compute(absent, flip):
                report(len(computed))

    def means(self, images: Sequence[Image], ids: Sequence[str], *, flip: bool = False) -> Tensor:
        """Return the mean over patches of each image, float32 [N, W]."""
        keys = _keys(images, ids, flip)
        missing = [number for number, key in enumerate(keys) if key not in self.known_means]
        for start in range(0, len(missing), CHUNK):
            chosen = missing[start : start + CHUNK]
            found = self.get([images[i] for i in chosen], [ids[i] for i in chosen], flip=flip)
            self.known_means |= zip((keys[i] for i in chosen), found.mean(1), strict=True)
        return torch.stack([self.known_means[key] for key in keys])

    def put(self, keys: Sequence[str], features: np.ndarray) -> None:
        """Append features [N, P, W], float16, under new keys.

        Raises:
            TrainError: the store is full, or the disk.
        """
        size = len(keys) * self.row_bytes
        if self.num_bytes + size > self.max_bytes:
            raise TrainError(
                f"the feature cache in {self.folder} holds {self.num_bytes / 1e9:.1f} GB, at most "
                f"{self.max_bytes / 1e9:.1f} GB are allowed, and a picture takes "
                f"{self.row_bytes / 1e6:.2f} MB: this data has too many pictures for it. Set "
                "feature_cache to false in the recipe, or use fewer."
            )
        data = np.ascontiguousarray(features, np.float16)
        places = {
            key: FeaturePlace(self.own, self.num_own + number, zlib.crc32(row.tobytes()))
            for number, (key, row) in enumerate(zip(keys, data, strict=True))
        }
        path = self.folder / f"{self.own}.f16"
        try:
            path.touch()
            with path.open("r+b") as file:
                file.seek(self.num_own * self.row_bytes)  # over what a full disk left of a row
                file.write(data.tobytes())
            with path.with_suffix(".rows").open("a", encoding="utf-8") as file:
                file.writelines(f"{p.row} {key} {p.checksum:08x}\n" for key, p in places.items())
        except OSError as error:
            raise TrainError(
                f"cannot write the feature cache {path}: {error}. Free some space, or set "
                "feature_cache to false in the recipe; what was computed before is kept."
            ) from error
        self.places |= places
        self.num_own += len(keys)
        self.num_bytes += size

    def _read(self, key: str) -> np.ndarray | None:
        """Return stored features [P, W]; None if there are none, or damaged ones."""
        place = self.places.get(key)
        if place is None:
            return None
        stored = self.maps.get(place.shard)
        if stored is None or place.row >= len(stored):  # it has grown
            path = self.folder / f"{place.shard}.f16"
            rows = path.stat().st_size // self.row_bytes
            stored = np.memmap(path, np.float16, "r", shape=(rows, *self.shape))
            self.maps[place.shard] = stored
        row = np.array(stored[place.row])
        return row if zlib.crc32(row.tobytes()) == place.checksum else None

    def _compute(self, images: Mapping[str, Named], flip: bool) -> Iterator[dict[str, np.ndarray]]:
        """Compute and store images' features, some at a time; the next ones are decoded
        meanwhile."""

        def decode(item: tuple[str, Named]) -> np.ndarray:
            return self._pixels(*item[1], flip)

        for chunk, pixels in decode_ahead(
            list(images.items()), decode, self.pool, chunk_size=CHUNK
        ):
            features = self._tower(torch.from_numpy(np.stack(pixels)))
            keys = [key for key, _ in chunk]
            self.put(keys, features)
            yield dict(zip(keys, features, strict=True))

    def _pixels(self, image: Image, id: str, flip: bool) -> np.ndarray:
        try:
            pixels = process_image(decode_image(image), self.processor)  # [3, S, S]
        except InputError as error:
            raise _unreadable(id, error) from error
        return pixels[..., ::-1].copy() if flip else pixels

    @torch.inference_mode()
    def _tower(self, pixels: Tensor) -> np.ndarray:
        """Return the tower features of images, computed as without a store (except for `half`)."""
        assert self.vlm.tower is not None
        device = next(self.vlm.tower.parameters()).device
        chunks = pixels.split(TOWER_BATCH) if device.type == "cpu" else (pixels,)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.half):
            found = [self.vlm.tower_features(chunk.to(device)).cpu() for chunk in chunks]
        features = torch.cat(found).half()
        if not features.isfinite().all():
            raise TrainError(
                f"the vision tower's output reaches {torch.cat(found).abs().max():.3g}, beyond "
                "float16, which the feature cache keeps; set feature_cache to false in the recipe."
            )
        return features.numpy()


def key_of(image: Image, flip: bool = False) -> str:
    """Return the key of an image's features."""
    return content_hash(image) + ("-flip" if flip else "")


def _keys(images: Sequence[Image], ids: Sequence[str], flip: bool) -> list[str]:
    keys = []
    for image, id in zip(images, ids, strict=True):
        try:
            keys.append(key_of(image, flip))
        except InputError as error:
            raise _unreadable(id, error) from error
    return keys


def _unreadable(id: str, error: InputError) -> TrainError:
    return TrainError(
        f"a picture of the sample {id!r} cannot be read: {error} Leave the record out or mend the "
        "file; `visavis data check` finds all of them."
    )


def tower_digest(vlm: VLM, processor: ImageProcessorConfig) -> str:
    """Return 16 hex digits of all that features depend on beside the image."""
    assert vlm.tower is not None
    config = vlm.config
    read = (config.select_layer, config.select_feature, config.drop_first_token)
    digest = hashlib.sha256(repr((sorted(processor.to_dict().items()), read)).encode())
    for name, tensor in vlm.tower.state_dict().items():
        digest.update(f"{name} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
