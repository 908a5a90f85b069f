"""Corpora embedded into shards: every item once, resumed after any stop, loaded into an index."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image as pil
from typer.testing import CliRunner

from tests.fakes import picture, tiny_model, write_pictures, write_tiny_checkpoint
from visavis.cli import app
from visavis.errors import InputError, StoreError
from visavis.index import Index
from visavis.index.shard_plan import kept_plan, make_plan, read_items
from visavis.index.shards import ShardWriter, done_shards, load_shards

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("fsspec")


def png(seed):
    data = io.BytesIO()
    picture(seed).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def corpus(tmp_path):
    """A folder of 7 images, one of them broken, a Parquet file of 5 rows and a tar of 3 images."""
    folder = tmp_path / "corpus"
    write_pictures(folder / "a", 6)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.docx").write_bytes(b"left out")
    rows = {
        "id": ["r0", "r1", None, "r3", "r4"],
        "image": [png(20), png(21), None, png(23), b"broken"],
        "text": ["twenty", None, "only a text", "a sunny beach", ""],
    }
    parquet.write_table(arrow.table(rows), folder / "rows.parquet", row_group_size=2)
    with tarfile.open(folder / "web.tar", "w") as tar:
        for name, content in (
            *((f"{i:03d}.png", png(30 + i)) for i in range(3)),
            ("001.txt", b"a caption of one"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return folder


def rows_in(output):
    tables = [parquet.read_table(path) for path in sorted(output.glob("part-*.parquet"))]
    return arrow.concat_tables(tables).to_pylist()


def embed(*arguments):
    return CliRunner().invoke(app, ["embed", *map(str, arguments)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model"))


def test_every_item_is_embedded_once(corpus, tmp_path, checkpoint):
    output = tmp_path / "shards"
    result = embed(
        checkpoint, "--corpus", corpus, "--output", output, "--shard-size", 4, "--json",
        "--precision", "f32",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout.strip().splitlines()[-1])
    assert (summary["shards"], summary["items"], summary["failed"]) == (5, 15, 2)
    assert summary["left_out"] == [
        {"suffix": ".docx", "reason": "not a supported suffix", "files": 1}
    ]
    rows = {row["source"]: row for row in rows_in(output)}
    names = {source.removeprefix(f"{corpus}/") for source in rows}
    assert names == {
        *(f"a/picture-{i:03d}.png" for i in range(6)),
        "broken.png",
        *(f"rows.parquet#{name}" for name in ("r0", "r1", "row=2", "r3", "r4")),
        *(f"web.tar#{i:03d}.png" for i in range(3)),
    }
    row = rows[f"{corpus}/rows.parquet#r3"]
    assert (row["kind"], row["text"], row["error"]) == ("image", "a sunny beach", "")
    model = tiny_model()
    expected = model.embed([picture(23), "only a text", picture(31)])
    names = ("rows.parquet#r3", "rows.parquet#row=2", "web.tar#001.png")
    for name, vector in zip(names, expected, strict=True):
        assert rows[f"{corpus}/{name}"]["vector"] == pytest.approx(vector.tolist(), abs=1e-5)
    assert rows[f"{corpus}/web.tar#001.png"]["text"] == "a caption of one"
    broken = rows[f"{corpus}/broken.png"]
    assert broken["vector"] is None and "is not a picture that can be read" in broken["error"]


def test_a_run_is_resumed_and_its_plan_kept(corpus, tmp_path, checkpoint):
    output = tmp_path / "shards"
    arguments = (checkpoint, "--corpus", corpus, "--output", output, "--shard-size", 4, "--json")
    assert embed(*arguments).exit_code == 0
    before = Counter(row["source"] for row in rows_in(output))
    (output / "part-000001.parquet").unlink()
    write_pictures(corpus / "a", 1, first_seed=99)  # comes later: would move all others
    result = embed(*arguments)
    assert json.loads(result.stdout.strip().splitlines()[-1])["made"] == 1
    assert Counter(row["source"] for row in rows_in(output)) == before
    result = embed(*arguments[:-2], 5)
    assert result.exit_code == 2 and "holds shards of" in result.output


def test_shards_are_loaded_into_an_index(corpus, tmp_path):
    model = tiny_model()
    output = str(tmp_path / "shards")
    writer = ShardWriter(model, output)
    for shard in make_plan([str(corpus)], 4).shards:
        writer.write(shard)
    with Index(tmp_path / "a.idx", model) as index:
        assert load_shards(index.store, output) == (13, 2)
        assert load_shards(index.store, output) == (13, 2)  # again: the same items
        assert len(index) == 13
        hit = index.search("sunny beach", k=1)[0]
        assert hit.source.endswith("rows.parquet#r3") and hit.words == ("sunny", "beach")
        photo = corpus / "a" / "picture-003.png"
        assert index.search(photo, k=1)[0].source == str(photo)
        assert index.add([corpus / "a"]).added == 0  # its vectors are known
    with Index(tmp_path / "b.idx", tiny_model(1)) as index:
        index.add({"text": "of another model"})
        with pytest.raises(StoreError, match="vectors of different models cannot be compared"):
            load_shards(index.store, output)


def test_shards_are_loaded_into_a_database(corpus, tmp_path, postgres):
    model = tiny_model()
    writer = ShardWriter(model, str(tmp_path / "shards"))
    for shard in make_plan([str(corpus)], 4).shards:
        writer.write(shard)
    for address in (postgres, str(tmp_path / "a.idx")):
        result = CliRunner().invoke(
            app, ["index", "load", address, str(tmp_path / "shards"), "--json"]
        )
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert (found["items"], found["put"], found["failed"]) == (13, 13, 2)
    with Index(postgres, model) as ours, Index(tmp_path / "a.idx", model) as file:
        found, expected = (one.search("sunny beach", k=5) for one in (ours, file))
        assert [(hit.source, hit.score) for hit in found] == [
            (hit.source, hit.score) for hit in expected
        ]


def test_shards_of_another_model_are_not_mixed(corpus, tmp_path):
    output = str(tmp_path / "shards")
    plan = make_plan([str(corpus)], 4)
    ShardWriter(tiny_model(), output).write(plan.shards[0])
    with pytest.raises(StoreError, match="name another output folder"):
        ShardWriter(tiny_model(1), output)
    with pytest.raises(StoreError, match="name another output folder"):
        ShardWriter(tiny_model(), output, instruction="other")


def test_corpora_and_shards_at_urls(corpus, tmp_path):
    model = tiny_model()
    url = f"file://{corpus}"
    plan = kept_plan(f"file://{tmp_path}/out", [url], 4)
    assert kept_plan(f"file://{tmp_path}/out", [url], 4) == plan
    writer = ShardWriter(model, f"file://{tmp_path}/out")
    for shard in plan.shards:
        writer.write(shard)
    assert len(done_shards(f"file://{tmp_path}/out")) == 5
    rows = {row["source"]: row for row in rows_in(tmp_path / "out")}
    assert len(rows) == 15 and all(source.startswith(url) for source in rows)
    ours = rows[f"{url}/a/picture-002.png"]
    assert ours["vector"] == pytest.approx(model.embed([picture(2)])[0].tolist(), abs=1e-5)
    assert ours["path"] == "" and "picture 002" in ours["found_text"]


def test_what_cannot_be_embedded_is_said(tmp_path, checkpoint):
    with pytest.raises(InputError, match="does not exist or is empty"):
        make_plan([str(tmp_path / "none")], 10)
    (tmp_path / "x.docx").write_bytes(b"x")
    with pytest.raises(InputError, match="nothing to embed in .* 1 other files are there"):
        make_plan([str(tmp_path)], 10)
    with pytest.raises(InputError, match="cannot be opened"):
        make_plan(["nonsense://bucket/x"], 10)
    parquet.write_table(arrow.table({"name": ["x"]}), tmp_path / "a.parquet")
    (part,) = make_plan([str(tmp_path / "a.parquet")], 10).shards[0].parts
    with pytest.raises(InputError, match="has the columns name, expected one named image"):
        list(read_items(part))
    (tmp_path / "b.parquet").write_bytes(b"damaged")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        make_plan([str(tmp_path / "b.parquet")], 10)
    for arguments, message in (
        ((), "--corpus needs --output"),
        (("--output", "x", "--engine", "spark"), "expected local or ray"),
        (("--output", "x", "--workers", 2), "add --engine ray"),
        (("--output", "x", "--text", "t"), "stands beside"),
    ):
        result = embed(checkpoint, "--corpus", tmp_path, *arguments)
        assert result.exit_code == 2 and message in result.output, result.output


def test_a_damaged_shard_is_an_error(corpus, tmp_path):
    output = tmp_path / "shards"
    ShardWriter(tiny_model(), str(output)).write(make_plan([str(corpus)], 99).shards[0])
    (output / "part-000001.parquet").write_bytes(b"damaged")
    with (
        Index(tmp_path / "a.idx", tiny_model()) as index,
        pytest.raises(StoreError, match="part-000001.parquet in .* cannot be read"),
    ):
        load_shards(index.store, str(output))
    other = tmp_path / "other"
    other.mkdir()
    parquet.write_table(arrow.table({"a": [1]}), other / "part-000000.parquet")
    with pytest.raises(StoreError, match="Parquet file of another program"):
        ShardWriter(tiny_model(), str(other))


def test_vectors_are_read_by_other_programs(corpus, tmp_path):
    output = tmp_path / "shards"
    (shard,) = kept_plan(str(output), [str(corpus / "a")], 99).shards
    ShardWriter(tiny_model(), str(output)).write(shard)
    table = parquet.read_table(output)
    vectors = np.stack(table.column("vector").combine_chunks().to_numpy(zero_copy_only=False))
    assert vectors.shape == (6, 16) and vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    assert pil.open(table.column("path")[0].as_py()).size == (48, 36)
