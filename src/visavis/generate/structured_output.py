"""Structured output: answers that match a JSON schema or a regular expression, by llguidance
(optional)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from visavis.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Grammar:
    """A grammar compiled for a tokenizer, once for many answers.

    Args:
        schema: a JSON schema as a dict or its text; or
        regex: a regular expression that the whole answer matches.
        eos_id: the token that ends an answer.

    Raises:
        InputError: llguidance is not installed, or the grammar is none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        eos_id: int,
        schema: Mapping[str, Any] | str | None = None,
        regex: str | None = None,
    ) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise InputError(
                "answers by schema or regular expression need the package llguidance; install it "
                "with `pip install 'visavis[grammar]'`."
            ) from error
        if (schema is None) == (regex is None):
            raise InputError("give one of a schema and a regex, not both")
        self.library, self.vocab_size, self.eos_id = llguidance, vocab_size, eos_id
        matcher = llguidance.LLMatcher
        if regex is not None:
            self.source = matcher.grammar_from_regex(regex)
        else:
            text = schema if isinstance(schema, str) else json.dumps(schema)
            self.source = matcher.grammar_from_json_schema(text)
        known = tokenizer.get_vocab_size(with_added_tokens=True)
        self.tokenizer = llguidance.LLTokenizer(
            tokenizer.to_str(), n_vocab=max(vocab_size, known), eos_token=eos_id
        )
        if problem := matcher.validate_grammar(self.source, self.tokenizer):
            raise InputError(f"the answer's schema or regex cannot be used: {problem}")

    def start(self) -> GrammarState:
        """Return the constraint of one answer."""
        return GrammarState(self)


class GrammarState:
    """Where in its grammar one answer stands."""

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar
        self.matcher = grammar.library.LLMatcher(grammar.tokenizer, grammar.source)

    def forbid(self, scores: Tensor) -> Tensor:
        """Return scores [vocab] with tokens that may not come at minus infinity."""
        if self.matcher.is_stopped():  # the answer is whole: only its end may follow
            allowed = torch.zeros(len(scores), dtype=torch.bool)
            allowed[self.grammar.eos_id] = True
        else:
            bits = torch.frombuffer(bytearray(self.matcher.compute_bitmask()), dtype=torch.uint8)
            spread = bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
            allowed = spread.flatten()[: len(scores)].bool()
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf)

    def accept(self, token: int) -> None:
        """Note what has been said."""
        if not self.matcher.is_stopped() and token != self.grammar.eos_id:
            self.matcher.consume_token(token)
