"""From messages to token ids: chat templates, image placeholders, loss masks.

A checkpoint's own jinja template is rendered in a sandbox; the named formats are data, in
`chat_formats.py`. Text that a user types never becomes a special token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2 import TemplateSyntaxError
from tokenizers import Tokenizer

from visavis.errors import CheckpointError, InputError
from visavis.inputs import Image, Message, Prompt, Text, Video
from visavis.processing import bounded
from visavis.processing.answer_mask import answer_mask, turn_ends
from visavis.processing.chat_formats import CHAT_FORMATS, ChatFormat
from visavis.processing.jinja_extensions import GENERATION_MARKS
from visavis.processing.jinja_sandbox import TemplateFailureError, check_syntax, render_bounded
from visavis.processing.tokenizer import SpecialTokens, encode, encode_spans
from visavis.processing.visual_text import VIDEO, Run, Visuals, VisualText, visuals_of, write_out

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Encoded:
    """One sequence of ids.

    Attributes:
        image_slots: (start, length) of each run of placeholders, in the order of the images.
        slots_per_image: how many of these runs each image has; empty: one each.
        loss_mask: which tokens are learned; all False with the generation prompt of jinja.
        positions: for M-RoPE, int64 [3, T] (see `model/rope.py`); None: 0, 1, 2, …
    """

    token_ids: list[int] = field(default_factory=list)
    image_slots: list[tuple[int, int]] = field(default_factory=list)
    slots_per_image: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    positions: Tensor | None = None

    def add(self, ids: Sequence[int], learned: bool = False) -> None:
        """Append ids."""
        self.token_ids += ids
        self.loss_mask += [learned] * len(ids)

    def add_image(self, token_id: int, count: int) -> None:
        """Append one image's placeholders."""
        self.image_slots.append((len(self.token_ids), count))
        self.add([token_id] * count)


class ChatTemplate:
    """A checkpoint's jinja chat template, rendered in a sandbox with limits of time and memory.

    Args:
        source: jinja source, as in `tokenizer.chat_template` or tokenizer_config.json.
        bos_token, eos_token: texts the template may write.

    Raises:
        CheckpointError: the source is empty, too long or not jinja.
    """

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "") -> None:
        if not source.strip():
            raise CheckpointError(
                "the checkpoint has no chat template, so its turns cannot be written as it was "
                f"trained; name one of {', '.join(sorted(CHAT_FORMATS))} as `chat_template` in its "
                "prompt profile, or use it for embedding only"
            )
        try:
            check_syntax(source)
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"the checkpoint's chat template is not valid jinja (line {error.lineno}: "
                f"{error.message}); name one of {', '.join(sorted(CHAT_FORMATS))} as "
                "`chat_template` in its prompt profile instead"
            ) from error
        self._source = source
        bounded.start()  # while weights are loaded
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = True,
        marks: tuple[str, str] = ("", ""),
    ) -> str:
        """Return the messages as one text, special tokens as their texts.

        Args:
            marks: texts written before and after each `{% generation %}` block.

        Raises:
            InputError: the template refuses these messages, for example two user turns in a row,
                or needs more time or memory than any honest template.
        """
        values = {
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            **self._tokens,
            GENERATION_MARKS: marks,
        }
        try:
            return render_bounded(self._source, values)
        except TemplateFailureError as error:
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
        text = {"type": "text", "text": "probe"}
        try:
            plain, rendered = (
                self.render([{"role": "user", "content": content}])
                for content in ([text], [{"type": "image"}, text])
            )
        except InputError:
            return False
        as_written = "'type'" in rendered  # the list itself, printed
        counts = (plain.count(image_text), rendered.count(image_text))
        return counts == (0, 1) and "probe" in rendered and not as_written


def encode_chat(
    prompt: Prompt,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    specials: SpecialTokens,
    *,
    image_token_id: int,
    tokens_per_image: Sequence[int | VisualText],
    video_token_id: int = -1,
    add_generation_prompt: bool = True,
) -> Encoded:
    """Encode turns with a jinja template; the ids are those of the whole rendered text.

    A template that writes image placeholders itself is given parts, and bos is put in front if the
    model wants one, as the processors of such checkpoints do.

    Args:
        tokens_per_image: of each image of the prompt, in order, the number of its placeholders, or
            how it is written where text stands among them.
        add_generation_prompt: write the start of an answer, and compute no loss mask.

    Raises:
        InputError: numbers of images differ, the template refuses the messages, or it does not
            show which tokens belong to an answer.
    """
    visuals = visuals_of(prompt, image_token_id, video_token_id, tokens_per_image)
    marks = _Marks(prompt, specials, visuals)
    text_of = {number: text for text, number in specials.by_text.items()}
    placeholder = text_of.get(image_token_id, "")
    takes_parts = bool(placeholder) and template.takes_parts(placeholder)
    apart = video_token_id >= 0 or visuals.written  # from images
    messages = [
        {"role": m.role, "content": marks.parts(m, apart) if takes_parts else marks.content(m)}
        for m in prompt.messages
    ]
    rendered = template.render(messages, add_generation_prompt)
    learned: list[bool] = []
    if not add_generation_prompt and any(one["role"] == "assistant" for one in messages):
        ends = turn_ends(tokenizer, specials)
        learned = answer_mask(template.render, messages, ends, marks.around_answers)
    if takes_parts and visuals.written:
        video = text_of.get(video_token_id, "")
        rendered, learned, found = write_out(rendered, learned, placeholder, video, visuals)
        if found != len(prompt.visuals):
            _misplaced(len(prompt.visuals), found)
    encoded = Encoded()
    marks.encode(encoded, rendered, tokenizer, specials, visuals.runs, learned)
    if takes_parts:
        encoded = _expand(encoded, specials, visuals.runs)
    return _all_images(encoded, visuals)


def encode_plain(
    prompt: Prompt,
    tokenizer: Tokenizer,
    specials: SpecialTokens,
    *,
    image_token_id: int,
    tokens_per_image: Sequence[int | VisualText],
    video_token_id: int = -1,
    prefix: str = "",
    suffix: str = "",
    image_start: str = "",
    image_end: str = "",
) -> Encoded:
    """Encode a prompt without turns, for embedding: bos if the model wants one, then
    `prefix`, the messages' parts in order (one line each), `suffix`, appended ids.

    What stands around it all and around each image may hold special tokens' texts; the prompt
    may not.

    Raises:
        InputError: numbers of images differ.
    """
    visuals = visuals_of(prompt, image_token_id, video_token_id, tokens_per_image)
    marks = _Marks(prompt, specials, visuals, image_start, image_end)
    text = prefix + "\n".join(map(marks.content, prompt.messages)) + suffix
    encoded = Encoded()
    if specials.add_bos and specials.bos_id is not None:
        encoded.add([specials.bos_id])
    marks.encode(encoded, text, tokenizer, specials, visuals.runs)
    encoded.add(specials.appended)
    return _all_images(encoded, visuals)


def encode_turns(
    prompt: Prompt,
    template: ChatFormat,
    tokenizer: Tokenizer,
    specials: SpecialTokens,
    *,
    image_token_id: int,
    tokens_per_image: Sequence[int | VisualText],
    video_token_id: int = -1,
    add_generation_prompt: bool = True,
    image_start: str = "",
    image_end: str = "",
) -> Encoded:
    """Encode turns with a turn template, whose ids are the same in training and in use and which
    says which of them are learned.

    A learned token is one whose last character is learned. Beginning-of-sequence stands first.

    Args:
        image_start, image_end: around each image, within what the template writes there.

    Raises:
        InputError: numbers of images differ, or the template has no such role here.
    """
    visuals = visuals_of(prompt, image_token_id, video_token_id, tokens_per_image)
    image_start, image_end = template.image_start + image_start, image_end + template.image_end
    marks = _Marks(prompt, specials, visuals, image_start, image_end)
    pieces = list(_turn_pieces(prompt, template, marks))
    if add_generation_prompt:
        pieces.append((template.turns["assistant"].start, False))
    if template.joined:
        text = "".join(piece for piece, _ in pieces)
        runs = [(text, [learned for piece, learned in pieces for _ in piece])]
    else:
        runs = [(piece, [learned] * len(piece)) for piece, learned in pieces]
    encoded = Encoded()
    if specials.add_bos and specials.bos_id is not None:
        encoded.add([specials.bos_id])
    for text, learned in runs:
        marks.encode(encoded, text, tokenizer, specials, visuals.runs, learned)
    return _all_images(encoded, visuals)


def _turn_pieces(prompt: Prompt, template: ChatFormat, marks: _Marks) -> Iterator[tuple[str, bool]]:
    """Yield texts, with marks in them, and whether each is learned."""
    yield template.before, False
    messages = list(prompt.messages)
    if template.system and (not messages or messages[0].role != "system"):
        messages.insert(0, Message("system", (Text(template.system),)))
    first_user = template.first_user
    for number, message in enumerate(messages):
        role = message.role
        if role not in template.turns:
            raise InputError(
                f"a message has the role {role!r}, expected one of "
                f"{', '.join(template.turns)}; this chat format has no other roles"
            )
        if role == "system" and template.system and number:
            raise InputError(
                "a system message comes after others, expected it first; this chat format has one "
                "system text, at its start"
            )
        turn = template.turns[role]
        if role == "user" and first_user is not None:
            turn, first_user = first_user, None
        yield turn.start + turn.gap, False
        learned = role == "assistant"
        yield marks.content(message, with_text=not turn.images_only), learned
        yield turn.end, learned
        yield turn.after, False


class _Marks:
    """Stand-ins for images and for special texts that people typed, while a template is rendered.

    A mark is text that occurs nowhere in the prompt, so it cannot be forged, and is not
    whitespace, so templates that trim do not lose it.
    """

    def __init__(
        self,
        prompt: Prompt,
        specials: SpecialTokens,
        visuals: Visuals,
        image_start: str = "",
        image_end: str = "",
    ) -> None:
        self.protected = specials.pattern
        if visuals.written:
            self.protected = re.compile(f"{specials.pattern.pattern}|{VIDEO}")
        self.visuals = iter(visuals.texts)
        self.image_start, self.image_end = image_start, image_end
        typed = "".join(
            part.text for m in prompt.messages for part in m.parts if isinstance(part, Text)
        )
        number = 0
        while f"\U000f0000{number}:" in typed:
            number += 1
        self.opening, self.closing = f"\U000f0000{number}:", "\U000f0001"
        self.pattern = re.compile(f"{self.opening}(i|s)([0-9]+){self.closing}")
        self.around_answers = (f"{self.opening}a{self.closing}", f"{self.opening}e{self.closing}")
        self.texts: list[str] = []  # special texts that were typed
        self.num_runs = 0

    def content(self, message: Message, with_text: bool = True) -> str:
        """Return one message's text with marks in it."""
        pieces, text = [], ""
        for part in message.parts:
            if isinstance(part, Image | Video):
                visual = next(self.visuals)
                numbers = range(self.num_runs, self.num_runs + len(visual.counts))
                written = visual.join([self._mark("i", number) for number in numbers])
                before, after = visual.marks
                start = self.image_start.removesuffix(before)
                end = self.image_end.removeprefix(after)
                pieces += [self._protect(text), start + written + end]
                self.num_runs = numbers.stop
                text = ""
            elif with_text and isinstance(part, Text):
                text += part.text  # joined first: parts may complete a special text together
        return "".join([*pieces, self._protect(text)])

    def parts(self, message: Message, videos_apart: bool) -> list[dict[str, str]]:
        """Return one message's images and texts, texts with marks in them."""
        pieces: list[dict[str, str]] = []
        text = ""
        for part in (*message.parts, None):
            if isinstance(part, Text):
                text += part.text
                continue
            if text:
                pieces.append({"type": "text", "text": self._protect(text)})
            if part is not None:
                is_video = videos_apart and isinstance(part, Video)
                pieces.append({"type": "video" if is_video else "image"})
            text = ""
        return pieces

    def encode(
        self,
        encoded: Encoded,
        rendered: str,
        tokenizer: Tokenizer,
        specials: SpecialTokens,
        runs: Sequence[Run],
        learned: Sequence[bool] = (),
    ) -> None:
        """Append a rendered text's ids: marks of images become placeholders, marks of typed
        specials plain text, special texts that are left the template's own special tokens.

        Args:
            learned: for each character whether it is; empty: none.
        """
        for kind, value, at in self._split_images(rendered):
            mask = learned[at : at + len(value)]
            if kind == "i":
                index = int(value)
                if index != len(encoded.image_slots):
                    _misplaced(index, len(encoded.image_slots))
                encoded.add_image(*runs[index])
            elif not self.pattern.search(value):
                _add_text(encoded, value, mask, tokenizer, specials)
            else:
                for piece, start, special in _split_specials(value, specials):
                    text, kept = self._restore(piece, mask[start : start + len(piece)])
                    _add_text(encoded, text, kept, tokenizer, specials, parse_special=False)
                    if special is not None:
                        encoded.add([special], any(mask[start + len(piece) :][:1]))

    def _restore(self, text: str, mask: Sequence[bool]) -> tuple[str, Sequence[bool]]:
        """Put typed special texts back, and stretch the mask over them."""
        pieces: list[str] = []
        kept: list[bool] = []
        at = 0
        for found in self.pattern.finditer(text):
            typed = self.texts[int(found[2])]
            pieces += [text[at : found.start()], typed]
            kept += [*mask[at : found.start()], *list(mask[found.start() :][:1]) * len(typed)]
            at = found.end()
        return "".join([*pieces, text[at:]]), [*kept, *mask[at:]]

    def _protect(self, text: str) -> str:
        def mark(found: re.Match[str]) -> str:
            self.texts.append(found[0])
            return self._mark("s", len(self.texts) - 1)

        return self.protected.sub(mark, text)

    def _mark(self, kind: str, number: int) -> str:
        return f"{self.opening}{kind}{number}{self.closing}"

    def _split_images(self, rendered: str) -> Iterator[tuple[str, str, int]]:
        """Yield ("text", piece, its start) and ("i", number of an image, its start), in order."""
        at = 0
        for found in self.pattern.finditer(rendered):
            if found[1] == "i":
                if found.start() > at:
                    yield "text", rendered[at : found.start()], at
                yield "i", found[2], found.start()
                at = found.end()
        if at < len(rendered):
            yield "text", rendered[at:], at


def _add_text(
    encoded: Encoded,
    text: str,
    mask: Sequence[bool],
    tokenizer: Tokenizer,
    specials: SpecialTokens,
    parse_special: bool = True,
) -> None:
    """Append a text's ids, learned where the mask says so of their last character."""
    if not any(mask):
        encoded.add(encode(tokenizer, specials, text, parse_special))
        return
    for number, (start, end) in encode_spans(tokenizer, specials, text, parse_special):
        encoded.add([number], mask[min(max(start, end - 1), len(text) - 1)])


def _split_specials(text: str, specials: SpecialTokens) -> Iterator[tuple[str, int, int | None]]:
    """Yield pieces of text and their starts, each with the id of the special token after it."""
    at = 0
    for found in specials.pattern.finditer(text):
        yield text[at : found.start()], at, specials.by_text[found[0]]
        at = found.end()
    yield text[at:], at, None


def _expand(flat: Encoded, specials: SpecialTokens, runs: Sequence[Run]) -> Encoded:
    """Return ids in which each placeholder that a template wrote stands for a whole run, the next
    of its kind: some templates move all images before all videos."""
    encoded, placed = Encoded(), []
    bos = specials.bos_id
    if specials.add_bos and bos is not None and flat.token_ids[:1] != [bos]:
        encoded.add([bos])
    kinds = [token_id for token_id, _ in runs]
    waiting = {kind: iter([i for i, one in enumerate(kinds) if one == kind]) for kind in kinds}
    for token_id, learned in zip(flat.token_ids, flat.loss_mask, strict=True):
        if token_id not in waiting:
            encoded.add([token_id], learned)
        elif (index := next(waiting[token_id], None)) is not None:
            encoded.add_image(*runs[index])
            placed.append(index)
        else:
            _misplaced(len(runs), len(placed) + 1)
    encoded.image_slots = [s for _, s in sorted(zip(placed, encoded.image_slots, strict=True))]
    return encoded


def _all_images(encoded: Encoded, visuals: Visuals) -> Encoded:
    if len(encoded.image_slots) != len(visuals.runs):
        _misplaced(len(visuals.runs), len(encoded.image_slots))
    encoded.slots_per_image = [len(text.counts) for text in visuals.texts]
    return encoded


def _misplaced(expected: int, found: int) -> NoReturn:
    raise InputError(
        f"the chat template dropped, repeated or moved an image: {found} placed where "
        f"{expected} were expected; it probably leaves out a message's content, such as a system "
        "message's: put the images into user messages"
    )
