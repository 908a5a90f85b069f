"""The store of tower features: the same values cold and warm, and after a crash; bounded."""

from __future__ import annotations

import copy
import io
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as pil

from tests.fakes import picture, tiny_model
from tests.train.training import TinyRun
from visavis.errors import TrainError
from visavis.inputs import Image, Prompt, Video
from visavis.processing.config import AnyresConfig
from visavis.processing.image_processor import pixels_of
from visavis.train.feature_store import FeatureStore, key_of

FLOAT16 = 2**-10  # relative error of rounding to float16, doubled


def png(seed: int) -> Image:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return Image(file.getvalue())


def open_store(folder: Path, **settings: Any) -> FeatureStore:
    model = tiny_model()
    assert model.processor is not None
    return FeatureStore(folder, model.vlm, model.processor, **settings)


def computed(store: FeatureStore, images: list[Image]) -> int:
    """Return how many pictures a store has to compute."""
    counts: list[int] = []
    store.add(images, ["s"] * len(images), report=counts.append)
    return sum(counts)


def read(store: FeatureStore, images: list[Image], *, flip: bool = False) -> torch.Tensor:
    return store.get(images, ["s"] * len(images), flip=flip)


def test_warm_equals_cold_and_the_tower(tmp_path: Path) -> None:
    images = [png(0), png(1), png(0)]
    store = open_store(tmp_path)
    assert computed(store, images) == 2  # equal pictures are computed once
    prompts = [Prompt.of({"image": [*images[:2]]}), Prompt.of("none"), Prompt.of(images[2])]
    cold = store.of(prompts, ["a", "b", "c"])
    assert cold.dtype == torch.float32 and torch.equal(cold[0], cold[2])
    warm = open_store(tmp_path)
    assert computed(warm, images) == 0
    assert torch.equal(read(warm, images), cold)
    model = tiny_model()
    assert model.processor is not None
    pixels, _ = pixels_of(images[1], model.processor, True)
    features = model.vlm.tower_features(torch.from_numpy(pixels))[0]
    torch.testing.assert_close(cold[1], features, rtol=FLOAT16, atol=FLOAT16)
    torch.testing.assert_close(store.means(images, ["s"] * 3), cold.mean(1))


@pytest.mark.parametrize("objective", ["generative", "contrastive"])
def test_losses_are_those_without_a_store(objective: str, tmp_path: Path) -> None:
    """Within what rounding features to float16 may do: a thousandth."""
    losses = []
    for folder in (None, tmp_path, tmp_path):  # without, cold, warm
        run = TinyRun()
        assert run.model.processor is not None
        if folder is not None:
            run.loader.features = FeatureStore(folder, run.vlm, run.model.processor)
        task = run.generative() if objective == "generative" else run.contrastive()
        lines = run.train(task, tmp_path / f"run-{len(losses)}", steps=3)
        losses.append([line["loss"][objective] for line in lines])
    assert losses[1] == losses[2]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_changed_picture_is_another_one(tmp_path: Path) -> None:
    store, path = open_store(tmp_path), tmp_path / "picture.png"
    picture(0).save(path)
    before = read(store, [Image(path)])
    picture(1).save(path)
    assert not torch.equal(read(store, [Image(path)]), before)
    assert torch.equal(read(store, [png(0)]), before)  # as bytes it is the same one


def test_mirrored_pictures_are_other_ones(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    mirrored = read(store, [png(3)], flip=True)
    assert not torch.equal(read(store, [png(3)]), mirrored)
    turned = Image(picture(3).transpose(pil.Transpose.FLIP_LEFT_RIGHT))
    torch.testing.assert_close(read(store, [turned]), mirrored, rtol=0, atol=5e-2)


def test_another_tower_or_sizing_or_layer_has_a_store_of_its_own(tmp_path: Path) -> None:
    model = tiny_model()
    assert model.processor is not None
    other = copy.deepcopy(model.vlm)
    other.config = replace(other.config, select_feature="class_patch")
    stores = [
        open_store(tmp_path),
        FeatureStore(tmp_path, tiny_model(1).vlm, model.processor),
        FeatureStore(tmp_path, model.vlm, replace(model.processor, resize="pad")),
        FeatureStore(tmp_path, other, model.processor),
    ]
    assert len({store.folder for store in stores}) == 4


def test_half_written_and_damaged_features_are_computed_again(tmp_path: Path) -> None:
    images = [png(0), png(1), png(2)]
    store = open_store(tmp_path)
    expected = read(store, images)
    (data,), (rows,) = tmp_path.glob("*/*.f16"), tmp_path.glob("*/*.rows")
    whole = data.read_bytes()
    data.write_bytes(whole[: -store.row_bytes // 2])  # the last one is half there
    rows.write_text(rows.read_text() + "3 0123")  # and a line
    again = open_store(tmp_path)
    assert computed(again, images) == 1
    assert torch.equal(read(again, images), expected)
    data.write_bytes(b"\x01" + whole[1:])
    third = open_store(tmp_path)
    assert torch.equal(read(third, images), expected)  # its checksum is not right
    assert torch.equal(read(open_store(tmp_path), images), expected)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.train.test_feature_store import open_store, png, read
store = open_store(Path({folder!r}))
read(store, [png(0)])
store.put(["half"], read(store, [png(1)]).half().numpy())
path = next(Path({folder!r}).glob("*/*.f16"))
with path.open("ab") as file:
    file.write(b"half of a picture")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_loses_no_finished_picture(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    code = KILLED.format(root=root, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL
    store = open_store(tmp_path)
    assert computed(store, [png(0), png(1)]) == 0
    assert torch.equal(read(store, [png(0)]), read(open_store(tmp_path / "other"), [png(0)]))


def test_processes_read_what_others_wrote(tmp_path: Path) -> None:
    one, other = open_store(tmp_path), open_store(tmp_path)
    computed(one, [png(0)])
    computed(other, [png(1)])
    one.refresh()
    assert computed(one, [png(0), png(1)]) == 0


def test_it_is_bounded(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_bytes=10_000)
    with pytest.raises(TrainError, match=r"too many pictures.*feature_cache"):
        computed(store, [png(seed) for seed in range(40)])


def test_what_it_cannot_keep_is_an_error(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with pytest.raises(TrainError, match="'seven' holds a video"):
        store.of([Prompt.of(Video([picture(0)]))], ["seven"])
    for broken in (Image(b"no picture"), Image(tmp_path / "none.png")):
        with pytest.raises(TrainError, match="a picture of the sample 'seven' cannot be read"):
            store.of([Prompt.of(broken)], ["seven"])
    model = tiny_model()
    assert model.processor is not None
    tiles = replace(model.processor, tiles=AnyresConfig(((32, 32), (64, 32))))
    with pytest.raises(TrainError, match="several views"):
        FeatureStore(tmp_path, model.vlm, tiles)
    with pytest.raises(TrainError, match="beyond float16"):
        big = copy.deepcopy(model.vlm)
        assert big.tower is not None
        for parameter in big.tower.parameters():
            torch.nn.init.constant_(parameter, 1e5)
        read(FeatureStore(tmp_path, big, model.processor), [png(0)])


def test_made_features_are_read_like_any(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    made = np.full((1, *store.shape), 0.5, np.float16)
    store.put([key_of(Image(b"a thing"))], made)
    assert (read(open_store(tmp_path), [Image(b"a thing")]) == 0.5).all()
