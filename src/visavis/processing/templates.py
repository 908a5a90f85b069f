"""From turns to token ids: chat templates, image placeholders, loss masks.

Two kinds of template: a checkpoint's own jinja source, rendered in a sandbox, and turn templates,
which are data here and also say which tokens are learned. What people type never becomes a special
token, whatever it looks like. Knows how many tokens an image takes only because it is told; opens
no image and runs no model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from visavis.errors import CheckpointError, InputError
from visavis.processing.tokenizer import SpecialTokens, encode
from visavis.prompt import Image, Message, Prompt

# What running a template can raise: its own refusals, and mistakes of its author.
_TEMPLATE_FAILURES = (
    TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)


@dataclass
class Encoded:
    """One sequence of ids.

    Attributes:
        image_slots: (start, length) of each image's placeholders, in the order of the images.
        loss_mask: which tokens are learned from; all False where a template cannot say.
    """

    token_ids: list[int] = field(default_factory=list)
    image_slots: list[tuple[int, int]] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)

    def add(self, ids: Sequence[int], learned: bool = False) -> None:
        """Append ids."""
        self.token_ids += ids
        self.loss_mask += [learned] * len(ids)

    def add_image(self, token_id: int, count: int) -> None:
        """Append one image's placeholders."""
        self.image_slots.append((len(self.token_ids), count))
        self.add([token_id] * count)


@dataclass(frozen=True)
class Turn:
    """What stands around one role's text: `start`, the text, `end`, `after`.

    An assistant's text and `end` are learned; `start` and `after` never are.
    """

    start: str
    end: str
    after: str = ""


@dataclass(frozen=True)
class TurnTemplate:
    """A chat format as data. Special tokens are written as their texts."""

    turns: dict[str, Turn]  # by role
    before: str = ""  # once, at the very start


TURNS = {
    # ChatML without a default system turn: the fewest tokens around a question.
    "chatml-bare": TurnTemplate(
        {
            role: Turn(f"<|im_start|>{role}\n", "<|im_end|>", "\n")
            for role in ("system", "user", "assistant")
        }
    ),
}


class ChatTemplate:
    """A checkpoint's jinja chat template, in a sandbox without access to anything.

    Args:
        source: jinja source, as in `tokenizer.chat_template` or tokenizer_config.json.
        bos_token, eos_token: texts the template may write.

    Raises:
        CheckpointError: the source is empty or not jinja.
    """

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "") -> None:
        if not source.strip():
            raise CheckpointError(
                "the checkpoint has no chat template, so its turns cannot be written as it was "
                f"trained; name one of {', '.join(sorted(TURNS))} as `turns` in its prompt "
                "profile, or use it for embedding only"
            )
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"the checkpoint's chat template is not valid jinja (line {error.lineno}: "
                f"{error.message}); name one of {', '.join(sorted(TURNS))} as `turns` in its "
                "prompt profile instead"
            ) from error
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}

    def render(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """Return the messages as one text, special tokens as their texts.

        Raises:
            InputError: the template refuses these messages, for example two user turns in a row.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            )
        except _TEMPLATE_FAILURES as error:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise InputError(
                f"the checkpoint's chat template refuses messages of the roles {roles}: {error}. "
                "Most templates expect an optional system message, then user and assistant in turn"
            ) from error

    def takes_parts(self, image_text: str) -> bool:
        """Return whether the template wants a message's content as a list of images and texts.

        Templates of vision-language checkpoints do, and write `image_text` for an image; others
        take one text. Found by trying, because nothing in a checkpoint says so.
        """
        content = [{"type": "image"}, {"type": "text", "text": "probe"}]
        try:
            rendered = self.render([{"role": "user", "content": content}])
        except InputError:
            return False
        as_written = "'type'" in rendered  # the list itself, printed
        return rendered.count(image_text) == 1 and "probe" in rendered and not as_written


def encode_chat(
    prompt: Prompt,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    specials: SpecialTokens,
    *,
    image_token_id: int,
    tokens_per_image: Sequence[int],
    add_generation_prompt: bool = True,
) -> Encoded:
    """Encode turns with a jinja template; the ids are those of the whole rendered text.

    Nothing is marked as learned: a jinja template does not say who wrote what. A template that
    writes image placeholders itself is given parts, and bos is put in front if the model wants
    one, as the processors of such checkpoints do.

    Args:
        tokens_per_image: how many placeholders each image of the prompt becomes, in order.

    Raises:
        InputError: numbers of images differ, or the template refuses the messages.
    """
    _check_images(prompt, tokens_per_image)
    marks = _Marks(prompt, specials)
    placeholder = next(
        (t for t, number in specials.by_text.items() if number == image_token_id), ""
    )
    takes_parts = bool(placeholder) and template.takes_parts(placeholder)
    content = marks.parts if takes_parts else marks.content
    messages = [{"role": m.role, "content": content(m)} for m in prompt.messages]
    rendered = template.render(messages, add_generation_prompt)
    encoded = Encoded()
    marks.encode(encoded, rendered, tokenizer, specials, image_token_id, tokens_per_image)
    if takes_parts:
        encoded = _expand(encoded, specials, image_token_id, tokens_per_image)
    return _all_images(encoded, tokens_per_image)


def encode_plain(
    prompt: Prompt,
    tokenizer: Tokenizer,
    specials: SpecialTokens,
    *,
    image_token_id: int,
    tokens_per_image: Sequence[int],
    prefix: str = "",
    suffix: str = "",
) -> Encoded:
    """Encode a prompt without turns, for embedding: bos if the model wants one, then
    `prefix`, the messages' parts in order (messages apart by a newline), `suffix`.

    `prefix` and `suffix` may hold special tokens' texts; the prompt may not.

    Raises:
        InputError: numbers of images differ.
    """
    _check_images(prompt, tokens_per_image)
    marks = _Marks(prompt, specials)
    text = prefix + "\n".join(map(marks.content, prompt.messages)) + suffix
    encoded = Encoded()
    if specials.add_bos and specials.bos_id is not None:
        encoded.add([specials.bos_id])
    marks.encode(encoded, text, tokenizer, specials, image_token_id, tokens_per_image)
    return _all_images(encoded, tokens_per_image)


def encode_turns(
    prompt: Prompt,
    template: TurnTemplate,
    tokenizer: Tokenizer,
    specials: SpecialTokens,
    *,
    image_token_id: int,
    tokens_per_image: Sequence[int],
    add_generation_prompt: bool = True,
) -> Encoded:
    """Encode turns with a turn template, piece by piece, so that the ids of a conversation are
    the same in training and in use, and each learned token is known.

    Raises:
        InputError: numbers of images differ, or the template has no such role.
    """
    _check_images(prompt, tokens_per_image)
    marks = _Marks(prompt, specials)
    encoded = Encoded()

    def add(text: str, learned: bool = False) -> None:
        encoded.add(encode(tokenizer, specials, text) if text else [], learned)

    if specials.add_bos and specials.bos_id is not None:
        encoded.add([specials.bos_id])
    add(template.before)
    for message in prompt.messages:
        if message.role not in template.turns:
            raise InputError(
                f"a message has the role {message.role!r}, expected one of "
                f"{', '.join(template.turns)}; this chat format has no other roles"
            )
        turn, learned = template.turns[message.role], message.role == "assistant"
        add(turn.start)
        content = marks.content(message)
        marks.encode(
            encoded, content, tokenizer, specials, image_token_id, tokens_per_image, learned
        )
        add(turn.end, learned)
        add(turn.after)
    if add_generation_prompt:
        add(template.turns["assistant"].start)
    return _all_images(encoded, tokens_per_image)


class _Marks:
    """Stand-ins for images and for special texts that people typed, while a template is rendered.

    A mark is text that occurs nowhere in the prompt, so it cannot be forged, and is not
    whitespace, so templates that trim do not lose it.
    """

    def __init__(self, prompt: Prompt, specials: SpecialTokens) -> None:
        self.specials = specials
        typed = "".join(
            part.text for m in prompt.messages for part in m.parts if not isinstance(part, Image)
        )
        number = 0
        while f"\U000f0000{number}:" in typed:
            number += 1
        self.opening, self.closing = f"\U000f0000{number}:", "\U000f0001"
        self.pattern = re.compile(f"{self.opening}(i|s)([0-9]+){self.closing}")
        self.texts: list[str] = []  # special texts that were typed
        self.num_images = 0

    def content(self, message: Message) -> str:
        """Return one message's text with marks in it."""
        pieces, text = [], ""
        for part in message.parts:
            if isinstance(part, Image):
                pieces += [self._protect(text), self._mark("i", self.num_images)]
                self.num_images += 1
                text = ""
            else:
                text += part.text  # joined first: parts may complete a special text together
        return "".join([*pieces, self._protect(text)])

    def parts(self, message: Message) -> list[dict[str, str]]:
        """Return one message's images and texts, texts with marks in them."""
        pieces: list[dict[str, str]] = []
        text = ""
        for part in (*message.parts, None):
            if part is not None and not isinstance(part, Image):
                text += part.text
                continue
            if text:
                pieces.append({"type": "text", "text": self._protect(text)})
            if part is not None:
                pieces.append({"type": "image"})
            text = ""
        return pieces

    def encode(
        self,
        encoded: Encoded,
        rendered: str,
        tokenizer: Tokenizer,
        specials: SpecialTokens,
        image_token_id: int,
        tokens_per_image: Sequence[int],
        learned: bool = False,
    ) -> None:
        """Append a rendered text's ids: marks of images become placeholders, marks of typed
        specials plain text, special texts that are left the template's own special tokens."""
        for kind, value in self._split_images(rendered):
            if kind == "i":
                index = int(value)
                if index != len(encoded.image_slots):
                    _misplaced(index, len(encoded.image_slots))
                encoded.add_image(image_token_id, tokens_per_image[index])
            elif not self.pattern.search(value):
                encoded.add(encode(tokenizer, specials, value), learned)
            else:
                for piece, special in _split_specials(value, specials):
                    restored = self.pattern.sub(lambda found: self.texts[int(found[2])], piece)
                    encoded.add(encode(tokenizer, specials, restored, parse_special=False), learned)
                    encoded.add([] if special is None else [special], learned)

    def _protect(self, text: str) -> str:
        def mark(found: re.Match[str]) -> str:
            self.texts.append(found[0])
            return self._mark("s", len(self.texts) - 1)

        return self.specials.pattern.sub(mark, text)

    def _mark(self, kind: str, number: int) -> str:
        return f"{self.opening}{kind}{number}{self.closing}"

    def _split_images(self, rendered: str) -> Iterator[tuple[str, str]]:
        """Yield ("text", piece) and ("i", number of an image), in order."""
        at = 0
        for found in self.pattern.finditer(rendered):
            if found[1] == "i":
                if found.start() > at:
                    yield "text", rendered[at : found.start()]
                yield "i", found[2]
                at = found.end()
        if at < len(rendered):
            yield "text", rendered[at:]


def _split_specials(text: str, specials: SpecialTokens) -> Iterator[tuple[str, int | None]]:
    """Yield pieces of text, each with the id of the special token that follows it, if any."""
    at = 0
    for found in specials.pattern.finditer(text):
        yield text[at : found.start()], specials.by_text[found[0]]
        at = found.end()
    yield text[at:], None


def _expand(
    flat: Encoded, specials: SpecialTokens, image_token_id: int, tokens_per_image: Sequence[int]
) -> Encoded:
    """Return ids in which each placeholder that a template wrote stands for a whole image."""
    encoded = Encoded()
    bos = specials.bos_id
    if specials.add_bos and bos is not None and flat.token_ids[:1] != [bos]:
        encoded.add([bos])
    for token_id in flat.token_ids:
        index = len(encoded.image_slots)
        if token_id != image_token_id:
            encoded.add([token_id])
        elif index < len(tokens_per_image):
            encoded.add_image(image_token_id, tokens_per_image[index])
        else:
            _misplaced(len(tokens_per_image), index + 1)
    return encoded


def _check_images(prompt: Prompt, tokens_per_image: Sequence[int]) -> None:
    if len(prompt.images) != len(tokens_per_image):
        raise InputError(
            f"the messages hold {len(prompt.images)} images but sizes of {len(tokens_per_image)} "
            "were given; expected one size per image, in order"
        )


def _all_images(encoded: Encoded, tokens_per_image: Sequence[int]) -> Encoded:
    if len(encoded.image_slots) != len(tokens_per_image):
        _misplaced(len(tokens_per_image), len(encoded.image_slots))
    return encoded


def _misplaced(expected: int, found: int) -> NoReturn:
    raise InputError(
        f"the chat template dropped, repeated or moved an image: {found} placed where "
        f"{expected} were expected; it probably leaves out a message's content, such as a system "
        "message's: put the images into user messages"
    )


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words; rendered as they are."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
