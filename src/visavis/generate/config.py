"""How an answer is generated: length, sampling, beam search, stop texts, structured output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from visavis.errors import InputError
from visavis.generate.beam_search import BeamSettings
from visavis.generate.sampling import Sampling
from visavis.utils import suggest


@dataclass(frozen=True)
class GenerationConfig:
    """The options of `Model.chat` and `Model.chat_many`; all may be left out.

    Args:
        max_new_tokens: stop after this many tokens.
        temperature, top_k, top_p, min_p, repetition_penalty, logit_bias, seed: see `Sampling`;
            greedy decoding without them.
        beams, length_penalty, early_stopping: beam search with more than one beam, see
            `BeamSettings`; not together with sampling options, schema or regex.
        stop: texts that end the answer and are not part of it.
        schema: a JSON schema that the answer follows; or
        regex: a regular expression that the whole answer matches (both need llguidance).

    Raises:
        InputError: a value is out of its range, or two options exclude each other.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    stop: tuple[str, ...] | list[str] | str = ()
    schema: Mapping[str, Any] | str | None = None
    regex: str | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1.")
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", tuple(filter(None, stops)))
        is_plain = self.sampling == Sampling() and not self.is_structured
        if self.beam_search.number > 1 and not is_plain:
            raise InputError(
                f"beams is {self.beams}: the likeliest answer is searched for, which goes with "
                "no temperature, cuts, penalty, bias, seed, schema or regex; leave them, or beams."
            )

    @classmethod
    def from_kwargs(cls, **options: Any) -> GenerationConfig:
        """Return the config of keyword arguments.

        Raises:
            InputError: an option is unknown; the message names the nearest one.
        """
        known = [option.name for option in fields(cls)]
        for name in options:
            if name not in known:
                raise InputError(f"unknown generation option {name!r}: {suggest(name, known)}")
        return cls(**options)

    @property
    def is_structured(self) -> bool:
        """Whether the answer follows a schema or regular expression."""
        return self.schema is not None or self.regex is not None

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen without beam search."""
        return Sampling(**{one.name: getattr(self, one.name) for one in fields(Sampling)})

    @property
    def beam_search(self) -> BeamSettings:
        """How beams are kept."""
        return BeamSettings(self.beams, self.length_penalty, self.early_stopping)
