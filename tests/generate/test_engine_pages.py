"""The engine over pages and static steps, as on CUDA, here on the CPU: the same answers."""

from __future__ import annotations

import pytest

from tests.fakes import picture, tiny_model
from tests.varlen import use_kernel
from visavis.api import Model
from visavis.errors import MemoryLimitError
from visavis.generate.engine import Engine
from visavis.generate.prefix_cache import PrefixCache
from visavis.inputs import Prompt
from visavis.model.cuda_graphs import StaticDecoder
from visavis.model.paged_kv_cache import PagePool

BEGINNING = "tell me all that there is to know about this thing, and "
PROMPTS = [
    Prompt.chat("what?"),
    Prompt.chat(BEGINNING + "why", [picture(1)]),
    Prompt.chat(BEGINNING + "where", [picture(1)]),
    Prompt.chat("which one?", [picture(2), picture(3)]),
    Prompt.chat(BEGINNING + "when"),
]


def engine_of(model: Model, num_pages: int, **settings: object) -> Engine:
    decoder = model.vlm.decoder
    page_bytes = PagePool(decoder.config, dtype=decoder.dtype, max_bytes=1 << 20, page=8).page_bytes
    pool = PagePool(decoder.config, dtype=decoder.dtype, max_bytes=num_pages * page_bytes, page=8)
    engine = Engine(model.vlm, model.image_encoder, **settings)  # type: ignore[arg-type]
    engine.static = StaticDecoder(decoder, pool)
    return engine


def replies(engine: Engine, model: Model, prompts: list[Prompt]) -> list[str]:
    answers = [model.ask(prompt, max_new_tokens=9) for prompt in prompts]
    of = {answer.sequence: answer for answer in answers}
    for sequence in engine.run(of):
        of[sequence].update()
    return [answer.reply.text for answer in answers]


@pytest.fixture(scope="module")
def expected() -> list[str]:
    model = tiny_model()
    return [
        replies(Engine(model.vlm, model.image_encoder), model, [prompt])[0] for prompt in PROMPTS
    ]


@pytest.mark.parametrize("max_sequences", [1, 3, 16])
@pytest.mark.parametrize("shared", [False, True])
def test_answers_are_those_of_plain_caches(
    expected: list[str], max_sequences: int, shared: bool
) -> None:
    model = tiny_model()
    prefixes = PrefixCache() if shared else None
    engine = engine_of(model, 400, max_sequences=max_sequences, prefixes=prefixes)
    for _ in range(2):
        assert replies(engine, model, PROMPTS) == expected
    assert engine.static is not None
    pool, kept = engine.static.pool, prefixes.entries if prefixes else {}
    assert bool(kept) == shared
    kept.clear()
    assert len(pool.free) == pool.num_pages - 1


def test_the_way_of_cuda_says_the_same(
    expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts and steps through the kernel's definition, over pages of 256 tokens."""
    use_kernel(monkeypatch)
    model = tiny_model()
    prefixes = PrefixCache()
    engine = Engine(model.vlm, model.image_encoder, max_sequences=3, prefixes=prefixes)
    assert engine.static is not None and engine.static.pool.page == 256
    for _ in range(2):
        assert replies(engine, model, PROMPTS) == expected
    assert prefixes.entries
    prefixes.entries.clear()
    assert len(engine.static.pool.free) == engine.static.pool.num_pages - 1


def test_prompts_wait_for_pages_and_what_was_read_makes_room(expected: list[str]) -> None:
    model = tiny_model()
    prefixes = PrefixCache()
    engine = engine_of(model, 34, prefixes=prefixes)
    most = 0
    for _ in range(2):
        answers = [model.ask(prompt, max_new_tokens=9) for prompt in PROMPTS]
        of = {answer.sequence: answer for answer in answers}
        for sequence in engine.run(of):
            of[sequence].update()
            most = max(most, len(engine.active))
        assert [answer.reply.text for answer in answers] == expected
    assert 1 < most < len(PROMPTS)


def test_a_prompt_that_never_fits_says_so() -> None:
    model = tiny_model()
    engine = engine_of(model, 4)
    with pytest.raises(MemoryLimitError, match="more pages of 8 tokens"):
        replies(engine, model, PROMPTS[:2])
    assert engine.static is not None and len(engine.static.pool.free) == 3
    assert not engine.busy


def test_beams_share_pages_and_return_them() -> None:
    model = tiny_model()
    engine = engine_of(model, 400)
    for prompt in PROMPTS[:2]:
        answer = model.ask(prompt, max_new_tokens=12, beams=4)
        for _ in engine.run([answer.sequence]):
            answer.update()
        plain = model.ask(prompt, max_new_tokens=12, beams=4)
        for _ in Engine(model.vlm, model.image_encoder).run([plain.sequence]):
            plain.update()
        assert answer.sequence.tokens == plain.sequence.tokens
    assert engine.static is not None
    pool = engine.static.pool
    assert len(pool.free) == pool.num_pages - 1
