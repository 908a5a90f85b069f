"""An index in PostgreSQL gives the answers of an index file, whatever is put, replaced, removed."""

from __future__ import annotations

import fnmatch
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from visavis.errors import NonFiniteError, StoreError
from visavis.index.filters import Filter
from visavis.index.postgres_schema import from_text, regex_of, to_text
from visavis.index.postgres_store import PostgresStore
from visavis.index.sqlite_store import SqliteStore
from visavis.index.store import IndexRow, Stamp

DIM = 8
META = {"model": "tiny", "fingerprint": "f00", "dim": str(DIM)}

# Few different values, so that items share contents, words, folders and dates.
_TEXTS = st.lists(
    st.sampled_from(
        [
            *("red", "Cars", "car", "running", "runs", "the", "Café", "cafe", "über", "2024"),
            *("x_y", "naïve", "北京", "résumé", "\0", "\ud800"),
        ]
    ),
    max_size=6,
).map(" ".join)
_PATHS = st.sampled_from(
    ["", "/a/1.jpg", "/a/b/2.jpg", "/ab/3.jpg", "/a/caf\udce9.jpg", "/a/[x].jpg", "/A/1.jpg"]
)
_METADATA = st.none() | st.dictionaries(
    st.sampled_from(["tag", "n", "a=b", "\0"]),
    st.sampled_from(["x", "\0y", 1, 1.5, True, None, ["x", 2], {"deep": "x"}]),
    max_size=2,
)


@st.composite
def _rows(draw):
    content = draw(st.integers(0, 5))
    # Vectors by content: equal and nearly equal ones among them.
    rng = np.random.default_rng(content // 2)
    vector = rng.normal(size=DIM) + (content % 2) * draw(st.sampled_from([0, 1e-8]))
    path = draw(_PATHS)
    return IndexRow(
        source=draw(st.sampled_from(["s1", "s2", "s\n3", "long " * 2000, "\0", "\udcff"])) + path,
        content=f"c{content}",
        vector=(vector / np.linalg.norm(vector)).astype(np.float32),
        kind=draw(st.sampled_from(["image", "page", "video", "text"])),
        path=path,
        page=draw(st.none() | st.integers(1, 3)),
        date=draw(st.none() | st.sampled_from([-5.0, 0.0, 1e9, 1e9 + 0.5])),
        place=draw(st.sampled_from(["", "Köln", "a\0b"])),
        text=draw(_TEXTS),
        found_text=draw(_TEXTS),
        metadata=draw(_METADATA),
        preview=draw(st.none() | st.just(b"\0\xff")),
        stamp=Stamp(draw(st.integers(0, 2)), draw(st.sampled_from([0, 2**63 - 1]))),
        parts=draw(st.integers(1, 2)),
        settings=draw(st.sampled_from(["", "ocr"])),
    )


_ACTIONS = st.lists(
    st.tuples(st.lists(_rows(), min_size=1, max_size=8), st.integers(0, 30)),
    min_size=1,
    max_size=3,
)
_FILTERS = st.none() | st.builds(
    Filter,
    kinds=st.lists(st.sampled_from(["image", "page", "text"]), max_size=2).map(tuple),
    folder=st.sampled_from(["", "/a", "/a/b", "/"]),
    glob=st.sampled_from(["", "*", "s?*", "*.jpg", "*[[]x]*", "*[!a-z].jpg", "s1*", "*\udce9*"]),
    after=st.none() | st.sampled_from([0.0, 1e9]),
    before=st.none() | st.sampled_from([1e9, 2e9]),
    metadata=st.lists(
        st.sampled_from([("tag", "x"), ("n", "1"), ("n", "true"), ("a=b", "2"), ("tag", "\0y")]),
        max_size=1,
    ).map(tuple),
)
_WORDS = st.lists(
    st.sampled_from(["red", "car", "cars", "run", "cafe", "CAFÉ", "the", "北京", "2024", "zzz"]),
    min_size=1,
    max_size=4,
    unique=True,
).map(tuple)


def test_answers_are_those_of_an_index_file(postgres):
    ours = PostgresStore(postgres)

    @settings(max_examples=25)
    @given(_ACTIONS, st.lists(_FILTERS, max_size=3), _WORDS, st.integers(1, 9))
    def check(actions, filters, words, k):
        emptied(ours)
        with tempfile.TemporaryDirectory() as folder:
            file = SqliteStore(Path(folder, "i.idx"))
            sources: list[str] = []
            for put, gone in actions:
                sources += [row.source for row in put]
                for store in (ours, file):
                    store.put(put, META)
                    store.remove([sources[gone % len(sources)], "unknown"])
            compare(ours, file, sources, [None, *filters], words, k)
            file.close()

    check()


def emptied(store):
    """Forget everything in a store."""
    if store.exists():
        with store.database.transaction(writing=True) as connection:
            connection.execute("TRUNCATE visavis_items, visavis_vectors")
            connection.execute("UPDATE visavis_meta SET value = '0' WHERE key LIKE 'num_%'")


def compare(ours, file, sources, filters, words, k):
    names = {store: {item.id: item.source for item in store.first(10**6)} for store in (ours, file)}

    def by_name(store, pairs):
        return [(names[store][number], *rest) for number, *rest in pairs]

    assert ours.meta() == file.meta() == META
    assert ours.known(sources) == file.known(sources)
    paths = [path for _, path in file.file_items()]
    assert list(ours.file_items()) == list(file.file_items())
    order = str  # of states, which have none
    assert {p: sorted(s, key=order) for p, s in ours.files(paths).items()} == {
        p: sorted(s, key=order) for p, s in file.files(paths).items()
    }
    for path in paths:
        assert ours.sources_of(path) == file.sources_of(path)
    assert ours.folders() == file.folders()
    contents = [f"c{number}" for number in range(7)]
    mine, others = ours.vectors_of(contents), file.vectors_of(contents)
    assert mine.keys() == others.keys()
    assert all(np.array_equal(mine[key], others[key]) for key in mine)
    query = np.random.default_rng(k).normal(size=DIM)
    query = (query / np.linalg.norm(query)).astype(np.float32)
    for conditions in filters:
        assert ours.count(conditions) == file.count(conditions)
        shown, expected = ours.first(k, 1, conditions), file.first(k, 1, conditions)
        assert [{**vars(item), "id": 0} for item in shown] == [
            {**vars(item), "id": 0} for item in expected
        ]
        found = by_name(ours, ours.nearest(query, k, conditions))
        assert found == by_name(file, file.nearest(query, k, conditions))
        found = by_name(
            ours, [(m.id, m.score, m.words) for m in ours.matching(words, k, conditions)]
        )
        wanted = by_name(
            file, [(m.id, m.score, m.words) for m in file.matching(words, k, conditions)]
        )
        assert [(name, had) for name, _, had in found] == [(name, had) for name, _, had in wanted]
        scores = [score for _, score, _ in found]
        assert scores == pytest.approx([score for _, score, _ in wanted], rel=1e-9)
    ids = {store: list(names[store]) for store in (ours, file)}
    mine, others = (sorted(by_name(s, s.cosines(query, ids[s]).items())) for s in (ours, file))
    assert mine == others


# ---- values and globs ----------------------------------------------------------------------------


@given(st.text(alphabet=st.characters(), max_size=20))
@example("\0\ud800\U0010fffd\udcff")
def test_every_text_is_given_back(text):
    stored = to_text(text)
    assert from_text(stored) == text
    assert "\0" not in stored
    stored.encode()


def test_globs_match_as_those_of_an_index_file(postgres):
    alphabet = st.sampled_from([*"ab]*?[!-^\\.\n", "é", "\ud800", "\0"])
    database = PostgresStore(postgres).database

    @settings(max_examples=300)
    @given(st.text(alphabet, max_size=8), st.text(alphabet, max_size=6))
    @example("[!]a]", "b")
    @example("[]-a]", "^")
    @example("[b-a]", "b")
    @example("[!b-a]", "b")
    @example("[", "[")
    def check(glob, text):
        found = database.all("SELECT %s::text ~ %s", (to_text(text), regex_of(glob)))[0][0]
        assert found == fnmatch.fnmatchcase(text, glob)

    check()


# ---- vectors -------------------------------------------------------------------------------------


def rows_of(vectors, prefix="s"):
    return [
        IndexRow(f"{prefix}{i}", f"{prefix}{i}", (v / np.linalg.norm(v)).astype(np.float32))
        for i, v in enumerate(vectors)
    ]


def test_many_equal_vectors_are_in_the_order_in_which_they_were_added(postgres):
    rng = np.random.default_rng(0)
    vectors = np.repeat(rng.normal(size=(2, DIM)), 200, axis=0)[rng.permutation(400)]
    store = PostgresStore(postgres)
    store.put(rows_of(vectors), META)
    query = rows_of(vectors)[0].vector
    found = store.items([number for number, _ in store.nearest(query, 150)])
    equal = [f"s{i}" for i in range(400) if np.array_equal(vectors[i], vectors[0])][:150]
    assert [found[number].source for number, _ in store.nearest(query, 150)] == equal


def test_an_hnsw_index_is_used_and_finds_nearly_all(postgres):
    rng = np.random.default_rng(0)
    store = PostgresStore(postgres)
    vectors = rng.normal(size=(2000, DIM))
    store.put(rows_of(vectors), META)
    queries = [row.vector for row in rows_of(rng.normal(size=(20, DIM)), "q")]
    exact = [store.nearest(query, 10) for query in queries]
    with store.database.transaction(writing=True) as connection:
        connection.execute(
            "CREATE INDEX nearest_vectors ON visavis_vectors USING hnsw (vector vector_ip_ops)"
        )
        connection.execute("SET enable_seqscan = off")  # as the planner decides for a large table
    found = [store.nearest(query, 10) for query in queries]
    store.database.all("SELECT pg_stat_force_next_flush()")
    uses = "SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelname = 'nearest_vectors'"
    assert store.database.all(uses)[0][0] >= 20
    shared = sum(
        len({n for n, _ in a} & {n for n, _ in b}) for a, b in zip(exact, found, strict=True)
    )
    assert shared >= 0.98 * 200
    assert all(len(one) == 10 for one in found)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_vectors_that_are_no_numbers_are_refused(postgres, bad):
    store = PostgresStore(postgres)
    vector = np.ones(DIM, np.float32)
    vector[3] = bad
    with pytest.raises(NonFiniteError, match="the vector of bad holds NaN or infinite numbers"):
        store.put([IndexRow("bad", "c", vector)], META)
    assert not store.exists()


def test_a_model_with_too_many_dimensions_is_refused(postgres):
    store = PostgresStore(postgres)
    with pytest.raises(StoreError, match="20000 dimensions, and pgvector's at most 16000"):
        store.put([IndexRow("a", "c", np.ones(20000, np.float32))], {**META, "dim": "20000"})
    assert not store.exists()


def test_vectors_longer_than_a_page(postgres):
    store = PostgresStore(postgres)
    vectors = np.random.default_rng(0).normal(size=(20, 4000))
    rows = rows_of(vectors)
    store.put(rows, {**META, "dim": "4000"})
    assert [number for number, _ in store.nearest(rows[7].vector, 1)] == [8]
