"""Prompts as token ids and references to their images, by a checkpoint's prompt profile."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

from visavis.errors import ContextLengthError, InputError
from visavis.inputs import Message, Part, Prompt, Text, Video
from visavis.model.config import Qwen2VLTowerConfig, VLMConfig
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
from visavis.processing.frame_sampling import time_instruction
from visavis.processing.image_processor import (
    ImageReference,
    grid_of,
    image_processor,
    times_of,
)
from visavis.processing.prompt_checks import check_chats, check_plain, check_single
from visavis.processing.prompt_config import PromptConfig
from visavis.processing.tokenizer import SpecialTokens
from visavis.processing.visual_text import STYLES, VisualText
from visavis.utils import lookup

if TYPE_CHECKING:
    from tokenizers import Tokenizer


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
        slots = iter(self.image_slots)
        numbers = self.slots_per_image or [1] * len(self.images)
        for image, number in zip(self.images, numbers, strict=True):
            place = 0
            for start, count in islice(slots, number):
                keys[start : start + count] = ((image.key, place + n) for n in range(count))
                place += count
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
        return self.config.has_decoder and bool(named) and self.profile.pooling != "multi"

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
        check_chats(self.config, self.profile.pooling, self.name)
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
                self._template_of(prompt),
                self.tokenizer,
                self.specials,
                add_generation_prompt=add_generation_prompt,
                **settings,
            )
        self._place(encoded, images)
        if cut is not None:
            _cut(encoded, cut)
        return self._prepared(encoded, images)

    def item(
        self, prompt: Prompt, instruction: str | None = None, *, document: bool = False
    ) -> PreparedPrompt:
        """Return the ids of an item that is embedded.

        Args:
            instruction: what the vector is for; joined to the item's text as the profile says.
            document: of multi-vector models: a text is to be found, and no query.

        Raises:
            InputError, ContextLengthError: see `chat`.
        """
        profile = self.profile
        prefix, between, suffix = profile.embed_prefix, "", profile.embed_suffix
        if profile.text_form:
            text, visuals = prompt.text, prompt.visuals
            check_plain(self.tokenizer, instruction or "", self.name)
            if profile.pooling == "multi":
                check_single(prompt, instruction or "", self.name)
            elif text and visuals and not profile.visual_text_form:
                raise InputError(
                    f"an item holds images and a text, but {self.name} embeds either in a tower "
                    "of its own and has no vector for both. Embed them apart; add the two vectors "
                    "and normalise the sum if one vector has to stand for both."
                )
            parts = [*visuals, Text(text)] if text else [*visuals]
            prefix, between, suffix = profile.around(
                bool(visuals), bool(text), instruction or "", document
            )
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
        return self._compiled(self.profile.jinja)

    @cached_property
    def video_template(self) -> ChatTemplate:
        """The template of prompts that hold a video."""
        return self._compiled(self.profile.video_jinja)

    def _template_of(self, prompt: Prompt) -> ChatTemplate:
        filmed = any(isinstance(one, Video) for one in prompt.visuals)
        return self.video_template if filmed and self.profile.video_jinja else self.template

    def _compiled(self, source: str) -> ChatTemplate:
        text = self.tokenizer.id_to_token
        bos, eos = (
            "" if number is None else text(number) or ""
            for number in (self.specials.bos_id, self.specials.eos_id)
        )
        return ChatTemplate(source, bos_token=bos, eos_token=eos)

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
                    times, duration = times_of(part, processor)
                    yield Text(time_instruction(duration, times) + "\n")

        return Prompt(tuple(replace(one, parts=tuple(timed(one))) for one in prompt.messages))

    def _settings(self, images: Sequence[ImageReference]) -> dict[str, Any]:
        return {
            "image_token_id": self.config.image_token_id,
            "video_token_id": self.config.video_token_id,
            "tokens_per_image": [self._written(one) for one in images],
        }

    def _written(self, image: ImageReference) -> int | VisualText:
        """Return how many placeholders an image becomes, or how it is written with text."""
        count, style = count_tokens(self.config, image.grid), self.profile.image_text
        if not style:
            return count
        assert self.processor is not None
        visual, times = image.visual, None
        if isinstance(visual, Video) and not image.grid.times:
            times = times_of(visual, self.processor)
        return STYLES[style](image.grid, count, times)

    def _place(self, encoded: Encoded, images: Sequence[ImageReference]) -> None:
        """Give a sequence its positions on three axes, where the decoder has them."""
        if images and self.config.decoder.mrope_sections:
            assert self.config.connector is not None
            length, merge = len(encoded.token_ids), self.config.connector.shuffle
            numbers = encoded.slots_per_image or [1] * len(images)
            runs = zip(images, numbers, strict=True)
            grids = [grid for one, number in runs for grid in one.grid.split(number)]
            tower = self.config.tower
            rate = tower.tokens_per_second if isinstance(tower, Qwen2VLTowerConfig) else 0
            slots = encoded.image_slots
            encoded.positions = mrope_positions(length, slots, grids, merge, rate)

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
