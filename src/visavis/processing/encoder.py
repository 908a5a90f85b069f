"""One model's way from prompts to token ids: its templates, its tokenizer, its image sizes.

The same for chat, embedding, training and evaluation. Pictures are looked at for their sizes only,
and only where the number of tokens depends on it. Knows configs; runs no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from visavis.errors import ContextLengthError, InputError
from visavis.model.config import VLMConfig
from visavis.model.fusion import count_tokens
from visavis.model.mrope import positions
from visavis.model.visual import Shape
from visavis.processing.images import ImageProcessorConfig
from visavis.processing.profile import PromptProfile
from visavis.processing.templates import (
    ChatTemplate,
    Encoded,
    encode_chat,
    encode_plain,
    encode_turns,
)
from visavis.processing.tokenizer import SpecialTokens
from visavis.processing.turns import TURNS
from visavis.processing.visuals import shape_of, sized_by_company, times_of
from visavis.prompt import Message, Part, Prompt, Text, Video
from visavis.registry import lookup

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class PromptEncoder:
    """Everything that turns prompts into ids.

    Args:
        name: the model's, for messages.
    """

    name: str
    config: VLMConfig
    tokenizer: Tokenizer
    specials: SpecialTokens
    profile: PromptProfile
    processor: ImageProcessorConfig | None

    @property
    def context_length(self) -> int:
        return self.config.decoder.context_length

    @property
    def can_chat(self) -> bool:
        return bool(self.profile.turns or self.profile.jinja)

    @property
    def stop(self) -> str:
        """Text that ends an answer, where no token does."""
        return TURNS[self.profile.turns].stop if self.profile.turns in TURNS else ""

    def chat(
        self, prompt: Prompt, *, add_generation_prompt: bool = True, cut: int | None = None
    ) -> Encoded:
        """Return the ids of turns and which of them are learned.

        Args:
            cut: keep only so many tokens, the first; None: all.

        Raises:
            InputError: the model cannot chat, or not about what the prompt holds.
            ContextLengthError: the prompt is longer than the model's context.
        """
        prompt = self._timed(prompt)
        shapes, profile = self._shapes(prompt), self.profile
        settings = self._settings(shapes)
        if profile.turns:
            encoded = encode_turns(
                prompt,
                lookup("turn template", profile.turns, TURNS),
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
        encoded = self._placed(encoded, shapes)
        if cut is not None:
            _cut(encoded, cut)
        return self.checked(encoded)

    def item(self, prompt: Prompt, instruction: str | None = None) -> Encoded:
        """Return the ids of an item that is embedded.

        Args:
            instruction: what the vector is for; joined to the item's text as the profile says.

        Raises:
            InputError, ContextLengthError: see `chat`.
        """
        profile = self.profile
        prompt = self.instructed(prompt, instruction)
        shapes = self._shapes(prompt)
        encoded = encode_plain(
            prompt,
            self.tokenizer,
            self.specials,
            prefix=profile.embed_prefix,
            suffix=profile.embed_suffix,
            image_start=profile.image_start,
            image_end=profile.image_end + profile.embed_image_end,
            **self._settings(shapes),
        )
        if profile.embed_positions == "grid":
            encoded = self._placed(encoded, shapes)
        return self.checked(encoded)

    def alone(self, prompt: Prompt) -> bool:
        """Return whether a prompt's pictures are sized as if each were its only one."""
        return len(prompt.visuals) == 1 or not sized_by_company(self.processor)

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
        if length >= self.context_length:
            raise ContextLengthError(
                f"the prompt has {length} tokens ({sum(n for _, n in encoded.image_slots)} of them "
                f"from images), but {self.name} reads at most {self.context_length - 1}. Shorten "
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
                "it instead, or name its format, visavis.load(…, turns='…'), one of: "
                f"{', '.join(sorted(TURNS))}."
            )
        text = self.tokenizer.id_to_token
        bos, eos = (
            "" if number is None else text(number) or ""
            for number in (self.specials.bos_id, self.specials.eos_id)
        )
        return ChatTemplate(self.profile.jinja, bos_token=bos, eos_token=eos)

    def _shapes(self, prompt: Prompt) -> list[Shape]:
        if prompt.visuals and self.config.tower is None:
            raise InputError(
                f"{self.name} has no vision tower, but the prompt holds {len(prompt.visuals)} "
                "image(s). Use a model with vision, such as 'nano', or send text only."
            )
        alone, processor = self.alone(prompt), self.processor
        return [shape_of(one, processor, alone) for one in prompt.visuals if processor]

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

    def _settings(self, shapes: Sequence[Shape]) -> dict[str, Any]:
        return {
            "image_token_id": self.config.image_token_id,
            "video_token_id": self.config.video_token_id,
            "tokens_per_image": [count_tokens(self.config, shape) for shape in shapes],
        }

    def _placed(self, encoded: Encoded, shapes: Sequence[Shape]) -> Encoded:
        """Give a sequence its positions on three axes, where the decoder has them."""
        if shapes and self.config.decoder.mrope_sections:
            assert self.config.connector is not None
            length, merge = len(encoded.token_ids), self.config.connector.shuffle
            encoded.positions = positions(length, encoded.image_slots, shapes, merge)
        return encoded

    def instructed(self, prompt: Prompt, instruction: str | None) -> Prompt:
        """Return an item with an instruction joined to its text, after its pictures."""
        if not instruction:
            return prompt
        joined = self.profile.instructed(instruction, prompt.text)
        return Prompt.of([*prompt.visuals, Text(joined)])


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
