"""Late interaction over the first hits, with a tiny model of many vectors."""

from __future__ import annotations

from pathlib import Path

import pytest

import visavis
from tests.fakes import tiny_model, write_pictures
from tests.parity.multi_vector_files import SAVE
from visavis import Index
from visavis.errors import InputError
from visavis.index.rerank import Reranker


def test_the_first_hits_are_ranked_again(tmp_path: Path) -> None:
    name = next(iter(SAVE))
    SAVE[name](tmp_path / "multi")
    model = visavis.load(tmp_path / "multi", precision="f32", device="cpu")
    paths = write_pictures(tmp_path / "images", 4)
    with Index(tmp_path / "a.idx", tiny_model()) as index:
        index.add([tmp_path / "images", {"text": "a note"}])
        plain = index.search("where?", k=5)
        reranker = Reranker(model)
        hits = index.search("where?", k=5, rerank=reranker)
        (query,) = model.embed_multi(["where?"])
        images = model.embed_multi(paths)
        notes = model.embed_multi(["a note"], documents=True)
        expected = {
            source: visavis.maxsim(query, document) / len(query)
            for source, document in zip(
                [*map(str, paths), "a note"], [*images, *notes], strict=True
            )
        }
        assert {hit.source: hit.late_score for hit in hits} == pytest.approx(expected, abs=1e-4)
        late = [h.late_score or 0.0 for h in hits]
        assert late == sorted(late, reverse=True)
        assert "late interaction" in hits[0].why
        assert {(hit.source, hit.score) for hit in hits} == {(h.source, h.score) for h in plain}
        assert index.search("where?", k=2, offset=1, rerank=model) == hits[1:3]
        paths[0].unlink()
        gone = index.search("where?", k=5, rerank=model)[-1]
        assert (gone.source, gone.late_score) == (str(paths[0]), None)
        assert index.search("where?", k=5, rerank=reranker) == hits  # remembered
        with pytest.raises(InputError, match="expected a model with a vector per token"):
            index.search("x", rerank=tiny_model())
