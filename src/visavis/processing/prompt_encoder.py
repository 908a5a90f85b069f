"""The prompt profile: everything about prompts that a checkpoint must bring along.

It is saved with the weights and never guessed from a name. `chat_template.py` applies its chat
format.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from visavis.errors import ContextLengthError, InputError
from visavis.inputs import Message, Part, Prompt, Text, Video
from visavis.model.config import VLMConfig
from visavis.model.embedder_config import ClipTextConfig
from visavis.model.image_tokens import count_tokens
from visavis.model.rope import mrope_positions
from visavis.processing.chat_formats import CHAT_FORMATS
from visavis.processing.chat_template import (
    ChatTemplate,
    Encoded,
    encode_chat,
    encode_plain,
    encode_turns,
)
from visavis.processing.config import ImageProcessorConfig
from visavis.processing.image_processor import (
    ImageReference,
    grid_of,
    image_processor,
    times_of,
)
from visavis.processing.tokenizer import SpecialTokens
from visavis.utils import lookup

if TYPE_CHECKING:
    from tokenizers import Tokenizer


CHAT_FIELDS = (
    "chat_template",
    "jinja",
    "image_start",
    "image_end",
    "video_times",
)  # the others are for embedding


@dataclass(frozen=True)
class PromptConfig:
    """How one checkpoint wants to be asked, and how it embeds.

    Args:
        chat_template: name of a format in `CHAT_FORMATS`; empty: use `jinja`.
        jinja: a chat template's source; both empty: the checkpoint cannot chat.
        image_start, image_end: special tokens around each image's own (LLaVA 1.0's
            mm_use_im_start_end), within what `chat_template` writes there.
        video_times: whose sentence on a video's length and its frames' times stands after each
            video in chat; empty: nobody's.
        embed_prefix, embed_suffix: text around an item that is embedded.
        embed_image_start, embed_image_end: text around each of its images and videos.
        text_form, visual_form, visual_text_form: the whole of an item of text, of images or videos,
            and of both, with {instruction}, {visual} and {text}; where they are given they stand
            in the place of `embed_prefix`, `embed_suffix` and `instruction_form`. What they leave
            out, such as an instruction, the model is not given.
        default_instruction: the {instruction} of these forms where none is given.
        pooling: `head` is the trained embedding head, `last` the final hidden state of the last
            token, `first` that of the first, `mean` the mean of all; all are L2-normalised.
        instruction_form: how an instruction and a text are joined; both fields must occur.
        embed_positions: of items of models with M-RoPE: `grid` on three axes, as in chat, or `flat`
            0, 1, 2, … as for text alone, which VLM2Vec trained with.
        min_score: the cosine similarity of a text and an image below which an image most likely
            does not show what the text says, calibrated on held-out images; -1: not calibrated.
    """

    chat_template: str = ""
    jinja: str = ""
    image_start: str = ""
    image_end: str = ""
    video_times: Literal["", "llava-video"] = ""
    embed_prefix: str = ""
    embed_suffix: str = ""
    embed_image_start: str = ""
    embed_image_end: str = ""
    text_form: str = ""
    visual_form: str = ""
    visual_text_form: str = ""
    default_instruction: str = ""
    pooling: Literal["head", "last", "first", "mean"] = "last"
    instruction_form: str = "{instruction}\n{text}"
    embed_positions: Literal["grid", "flat"] = "grid"
    min_score: float = -1.0

    def instructed(self, instruction: str, text: str) -> str:
        """Return an instruction and a text as one; without a text nothing is left between them."""
        before, after = self.instruction_form.split("{text}")
        form = f"{before}{{text}}{after}" if text else f"{before.rstrip()}{after}"
        return form.format(instruction=instruction, text=text)

    def around(self, has_visuals: bool, has_text: bool, instruction: str) -> tuple[str, str, str]:
        """Return the texts of the forms before, between and after the parts of an item.

        The second text is between the visuals and the text of the item.
        """
        form = self.text_form
        if has_visuals:
            form = self.visual_text_form if has_text else self.visual_form
        before, _, after = form.partition("{visual}" if has_visuals else "{text}")
        between, _, end = after.partition("{text}") if has_visuals and has_text else ("", "", after)
        instruction = instruction or self.default_instruction
        return before.replace("{instruction}", instruction), between, end

    def embedding_as(self, other: PromptConfig) -> PromptConfig:
        """Return a profile that chats as this one and embeds as another."""
        kept = {name: getattr(self, name) for name in CHAT_FIELDS}
        return dataclasses.replace(other, **kept)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


_GME = (
    "<|im_start|>system\n{{instruction}}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n<|endoftext|>"
)
_E5V = (
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n \n"
)
PROFILES = {  # how published models embed, where their files do not say
    # LLaVE: the answer is a newline, and the newline after its end is what is pooled.
    "llave": PromptConfig(
        embed_prefix="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n",
        embed_suffix="<|im_end|>\n<|im_start|>assistant\n\n<|im_end|>\n",
        embed_image_end="\n",
        instruction_form="{instruction} {text}\n",
    ),
    # VLM2Vec: no chat format and no marks around a picture's tokens, so that the code it was
    # trained with found no pictures to count positions for. The first is what MMEB's image data
    # hold, for both versions; the second what the second version makes of videos and pages.
    "vlm2vec-v1": PromptConfig(
        embed_image_end="\n",
        instruction_form="{instruction} {text}\n",
        embed_positions="flat",
    ),
    "vlm2vec-v2": PromptConfig(
        embed_image_end=" ",
        instruction_form="{instruction} {text}",
        embed_positions="flat",
    ),
    # GME: the instruction is the system's message.
    "gme": PromptConfig(
        embed_image_start="<|vision_start|>",
        embed_image_end="<|vision_end|>",
        text_form=_GME.format("{text}"),
        visual_form=_GME.format("{visual}"),
        visual_text_form=_GME.format("{visual}{text}"),
        default_instruction="You are a helpful assistant.",
    ),
    # E5-V: each kind of item is summed up in one word; instructions are not given.
    "e5-v": PromptConfig(
        text_form=_E5V.format("{text}\nSummary above sentence in one word: "),
        visual_form=_E5V.format("{visual}\nSummary above image in one word: "),
        visual_text_form=_E5V.format(
            "{visual}\n{text}\nSummary above image and text in one word: "
        ),
    ),
    # Nothing around an item; its instruction in a line of its own.
    "plain": PromptConfig(),
}


@dataclass
class PreparedPrompt(Encoded):
    """The ids of a prompt, which of them are learned, and references to its images and videos.

    Attributes:
        images: of each image and video, in the order of `image_slots`.
    """

    images: tuple[ImageReference, ...] = ()

    @property
    def token_keys(self) -> tuple[Hashable, ...]:
        """A key for each token: its id, or the content key of its image and its place there. Needs
        images whose content is known (`ContentHasher.identify`)."""
        keys: list[Hashable] = list(self.token_ids)
        for image, (start, count) in zip(self.images, self.image_slots, strict=True):
            keys[start : start + count] = ((image.key, place) for place in range(count))
        return tuple(keys)


@dataclass(frozen=True)
class PromptEncoder:
    """Everything that turns prompts into ids.

    Args:
        name: the model's, for messages.
        text_tokenizer: the text tower's, which reads what is embedded; None: `tokenizer` does.
    """

    name: str
    config: VLMConfig
    tokenizer: Tokenizer
    specials: SpecialTokens
    profile: PromptConfig
    processor: ImageProcessorConfig | None
    text_tokenizer: Tokenizer | None = None

    @property
    def context_length(self) -> int:
        return self.config.decoder.context_length

    @property
    def can_chat(self) -> bool:
        named = self.profile.chat_template or self.profile.jinja
        return self.config.has_decoder and bool(named)

    @property
    def stop(self) -> str:
        """Text that ends an answer, where no token does."""
        return (
            CHAT_FORMATS[self.profile.chat_template].stop
            if self.profile.chat_template in CHAT_FORMATS
            else ""
        )

    def chat(
        self, prompt: Prompt, *, add_generation_prompt: bool = True, cut: int | None = None
    ) -> PreparedPrompt:
        """Return the ids of turns and which of them are learned.

        Args:
            cut: keep only this many tokens, the first; None: all.

        Raises:
            InputError: the model cannot chat, or not about what the prompt holds.
            ContextLengthError: the prompt is longer than the model's context.
        """
        self.need_decoder()
        prompt = self._timed(prompt)
        images, profile = self._references(prompt), self.profile
        settings = self._settings(images)
        if profile.chat_template:
            encoded = encode_turns(
                prompt,
                lookup("chat template", profile.chat_template, CHAT_FORMATS),
                self.tokenizer,
                self.specials,
                image_start=profile.image_start,
                image_end=profile.image_end,
                add_generation_prompt=add_generation_prompt,
                **settings,
            )
        else:
            encoded = encode_chat(
                prompt,
                self.template,
                self.tokenizer,
                self.specials,
                add_generation_prompt=add_generation_prompt,
                **settings,
            )
        self._place(encoded, images)
        if cut is not None:
            _cut(encoded, cut)
        return self._prepared(encoded, images)

    def item(self, prompt: Prompt, instruction: str | None = None) -> PreparedPrompt:
        """Return the ids of an item that is embedded.

        Args:
            instruction: what the vector is for; joined to the item's text as the profile says.

        Raises:
            InputError, ContextLengthError: see `chat`.
        """
        profile = self.profile
        prefix, between, suffix = profile.embed_prefix, "", profile.embed_suffix
        if profile.text_form:
            text, visuals = prompt.text, prompt.visuals
            self._check_plain(instruction or "")
            if text and visuals and not profile.visual_text_form:
                raise InputError(
                    f"an item holds images and a text, but {self.name} embeds either in a tower "
                    "of its own and has no vector for both. Embed them apart; add the two vectors "
                    "and normalise the sum if one vector has to stand for both."
                )
            parts = [*visuals, Text(text)] if text else [*visuals]
            prefix, between, suffix = profile.around(bool(visuals), bool(text), instruction or "")
            prompt = Prompt.of(parts)
        else:
            prompt = self.instructed(prompt, instruction)
        images = self._references(prompt)
        tokenizer, specials = self.tokenizer, self.specials
        if self.text_tokenizer is not None:
            tokenizer, specials = self.text_tokenizer, plain_specials(self.text_tokenizer)
        elif self.config.is_dual and images:  # no text, and none of its special tokens
            specials = plain_specials(tokenizer)
        encoded = encode_plain(
            prompt,
            tokenizer,
            specials,
            prefix=prefix,
            suffix=suffix,
            image_start=profile.image_start + profile.embed_image_start,
            image_end=profile.image_end + profile.embed_image_end + between,
            **self._settings(images),
        )
        if profile.embed_positions == "grid":
            self._place(encoded, images)
        prepared = self._prepared(encoded, images)
        self._pad(prepared)
        return prepared

    def _pad(self, prepared: PreparedPrompt) -> None:
        """Fill a text up with padding tokens, where the text tower was trained to read them."""
        tower = self.config.text_tower
        if not isinstance(tower, ClipTextConfig) or not tower.padded or prepared.images:
            return
        assert self.specials.pad_id is not None
        more = [self.specials.pad_id] * (tower.context_length - len(prepared.token_ids))
        ids = prepared.token_ids
        prepared.token_ids = more + ids if tower.padded == "left" else ids + more
        prepared.loss_mask = [False] * len(prepared.token_ids)

    def need_decoder(self) -> None:
        """Refuse to chat without a language model.

        Raises:
            InputError: there is none.
        """
        if not self.config.has_decoder:
            raise InputError(
                f"{self.name} only embeds texts and images; it has no language model that could "
                "answer. Use embed, or a model that chats, such as 'nano'."
            )

    def _check_plain(self, instruction: str) -> None:
        """Refuse an instruction that would be read as special tokens, where it stands among them.

        Raises:
            InputError: it holds the text of one.
        """
        for token in self.tokenizer.get_added_tokens_decoder().values():
            if token.special and token.content in instruction:
                raise InputError(
                    f"the instruction holds {token.content!r}, which {self.name} reads as a mark "
                    "of its prompt format; write the instruction without it"
                )

    def _prepared(self, encoded: Encoded, images: tuple[ImageReference, ...]) -> PreparedPrompt:
        return PreparedPrompt(**vars(self.checked(encoded)), images=images)

    def checked(self, encoded: Encoded) -> Encoded:
        """Return a sequence that holds something and fits the context.

        Raises:
            InputError: it holds no token.
            ContextLengthError: it does not fit.
        """
        length = len(encoded.token_ids)
        if not length:
            raise InputError(
                f"the prompt has no tokens: nothing of its text is left as {self.name} reads it, "
                "perhaps only marks that its tokenizer drops. Give some text or an image."
            )
        most = self.context_length - self.config.has_decoder  # room for an answer
        if self.config.is_dual and encoded.image_slots:
            return encoded  # images alone, which no text tower reads
        if length > most:
            raise ContextLengthError(
                f"the prompt has {length} tokens ({sum(n for _, n in encoded.image_slots)} of them "
                f"from images), but {self.name} reads at most {most}. Shorten "
                "the text, split it into several items, or use fewer images."
            )
        return encoded

    @cached_property
    def template(self) -> ChatTemplate:
        """The checkpoint's own chat template.

        Raises:
            InputError: there is none.
        """
        if not self.profile.jinja:
            raise InputError(
                f"{self.name} brings no chat template, so how to ask it is unknown. Embed with "
                "it instead, or name its format, visavis.load(…, chat_template='…'), one of: "
                f"{', '.join(sorted(CHAT_FORMATS))}."
            )
        text = self.tokenizer.id_to_token
        bos, eos = (
            "" if number is None else text(number) or ""
            for number in (self.specials.bos_id, self.specials.eos_id)
        )
        return ChatTemplate(self.profile.jinja, bos_token=bos, eos_token=eos)

    def _references(self, prompt: Prompt) -> tuple[ImageReference, ...]:
        if prompt.visuals and self.config.tower is None:
            raise InputError(
                f"{self.name} has no vision tower, but the prompt holds {len(prompt.visuals)} "
                "image(s). Use a model with vision, such as 'nano', or send text only."
            )
        processor = self.processor
        if processor is None:
            return ()
        depends = image_processor(processor).depends_on_image_count
        only = len(prompt.visuals) == 1 or not depends
        return tuple(
            ImageReference(one, grid_of(one, processor, only), only) for one in prompt.visuals
        )

    def _timed(self, prompt: Prompt) -> Prompt:
        """Return a prompt with each video's times in words after it, where the profile has them."""
        processor = self.processor
        if not self.profile.video_times or processor is None:
            return prompt

        def timed(message: Message) -> Iterator[Part]:
            for part in message.parts:
                yield part
                if isinstance(part, Video):
                    yield Text(times_of(part, processor) + "\n")

        return Prompt(tuple(replace(one, parts=tuple(timed(one))) for one in prompt.messages))

    def _settings(self, images: Sequence[ImageReference]) -> dict[str, Any]:
        return {
            "image_token_id": self.config.image_token_id,
            "video_token_id": self.config.video_token_id,
            "tokens_per_image": [count_tokens(self.config, one.grid) for one in images],
        }

    def _place(self, encoded: Encoded, images: Sequence[ImageReference]) -> None:
        """Give a sequence its positions on three axes, where the decoder has them."""
        if images and self.config.decoder.mrope_sections:
            assert self.config.connector is not None
            length, merge = len(encoded.token_ids), self.config.connector.shuffle
            grids = [one.grid for one in images]
            encoded.positions = mrope_positions(length, encoded.image_slots, grids, merge)

    def instructed(self, prompt: Prompt, instruction: str | None) -> Prompt:
        """Return an item with an instruction joined to its text, after its images."""
        if not instruction:
            return prompt
        joined = self.profile.instructed(instruction, prompt.text)
        return Prompt.of([*prompt.visuals, Text(joined)])


def plain_specials(tokenizer: Tokenizer) -> SpecialTokens:
    """Return special tokens of which none is added to a text, and none is read from one."""
    added = tokenizer.get_added_tokens_decoder()
    by_text = {token.content: number for number, token in added.items() if token.special}
    return SpecialTokens(None, None, (), None, False, by_text)


def _cut(encoded: Encoded, length: int) -> None:
    """Leave out what follows the first `length` tokens.

    Raises:
        InputError: an image reaches beyond them.
    """
    end = max((start + count for start, count in encoded.image_slots), default=0)
    if end > length:
        raise InputError(
            f"its images reach to token {end}, and only {length} are kept: an image cannot be cut; "
            "allow more tokens, or use fewer images"
        )
    encoded.token_ids, encoded.loss_mask = encoded.token_ids[:length], encoded.loss_mask[:length]
    if encoded.positions is not None:
        encoded.positions = encoded.positions[:, :length]
