"""`visavis bench` on a tiny model: every rate is there, floors follow from the machine's peaks."""

from __future__ import annotations

import json

import pytest

from tests.fakes import tiny_model
from visavis.bench import BenchReport, decoder_weights, measure
from visavis.errors import InputError


def test_every_rate_is_measured() -> None:
    *said, report = measure(tiny_model(), 0.5, runs=1)
    assert isinstance(report, BenchReport) and all(isinstance(words, str) for words in said)
    names = [row.name for row in report.rows]
    assert names[:4] == ["load", "prefill", "decode", "decode, 8 at a time"]
    assert names[4:] == ["embed texts", "embed pictures", "a known picture"]
    assert all(0 < row.lowest <= row.value <= row.highest for row in report.rows)
    floors = {row.name: row.floor for row in report.rows}
    assert floors["decode"] == pytest.approx(report.machine.bandwidth / report.weight_bytes)
    assert json.loads(json.dumps(report.to_dict()))["rows"][0]["name"] == "load"


def test_the_weights_a_token_reads_are_blocks_and_head() -> None:
    vlm = tiny_model().vlm
    config = vlm.config.decoder
    block = 32 * (32 + 16 + 16) + 32 * 32 + 32 * 96 + 48 * 32
    numbers, size = decoder_weights(tiny_model())
    assert numbers == config.num_layers * block + config.vocab_size * 32
    assert size == 4 * numbers


def test_fewer_than_one_run_is_refused() -> None:
    with pytest.raises(InputError, match="runs is 0"):
        next(iter(measure(tiny_model(), 0.5, runs=0)))
