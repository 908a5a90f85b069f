"""The store of tower features: same values cold and warm, survives a crash, keyed by content."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from tests.fakes import picture, tiny_model
from visavis.train.features import TowerFeatures


def png(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


def open_store(folder: Path) -> TowerFeatures:
    model = tiny_model()
    assert model.processor is not None
    return TowerFeatures(folder, model.vlm, model.processor)


def test_warm_equals_cold_and_the_tower(tmp_path: Path) -> None:
    images = [png(0), png(1), png(0)]
    store = open_store(tmp_path)
    computed: list[int] = []
    rows = store.add(images, report=computed.append)
    assert rows == [0, 1, 0] and sum(computed) == 2  # equal pictures are computed once
    cold = store[rows]
    warm_store = open_store(tmp_path)
    assert warm_store.add(images, report=computed.append) == rows and sum(computed) == 2
    assert torch.equal(warm_store[rows], cold)
    alone = warm_store._compute(torch.from_numpy(pixels(images[1]))[None])
    assert torch.allclose(cold[1], torch.from_numpy(alone)[0].float(), atol=2e-3)


def pixels(image: bytes) -> object:
    from visavis.processing.images import decode_image, process_image

    processor = tiny_model().processor
    assert processor is not None
    return process_image(decode_image(image), processor)


def test_mirrored_pictures_are_other_rows(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    plain, mirrored = store.add([png(3)])[0], store.add([png(3)], flip=True)[0]
    assert plain != mirrored
    assert not torch.equal(store[[plain]], store[[mirrored]])


def test_half_written_rows_are_cut_off(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    rows = store.add([png(0), png(1)])
    expected = store[rows]
    with store.data_path.open("ab") as file:
        file.write(b"half of a row")
    with store.rows_path.open("a") as file:
        file.write("0123")  # a hash without its end
    again = open_store(tmp_path)
    assert len(again.rows) == 2
    assert again.add([png(2)]) == [2]
    assert torch.equal(again[rows], expected)
