"""The public API of a loaded model: `load`, then `Model.chat`, `embed` and `trace`.

Converts inputs to packed batches, runs the model and converts the results. The index, the server
and the command line build on it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from visavis.checkpoints.bundled import cache_dir
from visavis.checkpoints.checkpoint import Checkpoint
from visavis.checkpoints.load import load_checkpoint
from visavis.errors import InputError, NonFiniteError
from visavis.generate.beam_search import BeamSearch
from visavis.generate.config import GenerationConfig
from visavis.generate.engine import Engine, GeneratedSequence
from visavis.generate.prefix_cache import PrefixCache
from visavis.generate.sampling import Sampler
from visavis.generate.streaming import Answer, Reply
from visavis.generate.structured_output import Grammar
from visavis.inputs import Prompt
from visavis.memory import enough_memory
from visavis.model.quantized_linear import QuantizedLinear
from visavis.processing.feature_cache import DiskFeatureCache
from visavis.processing.items import list_prompts, name_item
from visavis.processing.prompt_checks import need_decoder
from visavis.processing.prompt_encoder import PreparedPrompt
from visavis.reranker import Reranker
from visavis.utils import track

FEATURE_VERSION = 1  # raised when the code computes other features of the same image


@dataclass(frozen=True)
class Trace:
    """Token ids, hidden states and logits of one prompt, for comparisons and inspection.

    Attributes:
        token_ids: int64 [T], image placeholders included.
        image_slots: (first position, number of tokens) of each image; of several runs of tokens
            where text stands among those of one image.
        hidden: float32 [T, D], after the final norm.
        logits: float32 [T, vocab].
    """

    token_ids: np.ndarray
    image_slots: list[tuple[int, int]]
    hidden: np.ndarray
    logits: np.ndarray


def load(
    name_or_path: str | Path,
    *,
    precision: str = "auto",
    device: str = "auto",
    chat_template: str = "",
    profile: str = "",
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    image_cache: str | Path | None = None,
) -> Model:
    """Load a model by name (`nano`, or another of `visavis models`), hub id, folder or .gguf file.

    Args:
        precision: "auto" keeps what a GGUF file quantises so, and computes in bfloat16 where the
            machine can; "int8" and "int4" quantise any checkpoint while it is read; "f32", "bf16"
            and "f16" convert all weights to that type.
        device: "auto", "cpu" or "cuda".
        chat_template: the chat format, by name, of a checkpoint that does not bring its own.
        profile: how to embed, by name, where the files do not say: "vlm2vec-v1", "vlm2vec-v2",
            "llave", "gme", "ops-mm", "b3", "unime-v2", "e5-v", "qwen3-vl-embedding",
            "qwen3-vl-reranker" or "plain".
        base: the language model that a folder without one was trained on.
        vision_tower: the folder of a vision tower that the checkpoint names and does not hold, or
            the mmproj file of a .gguf model.
        image_cache: a folder that keeps image features from one process to the next, at most
            4 GB, by content and model; "auto": one in the cache of the bundled models.

    Raises:
        UnknownNameError: no such name, path or chat format; the message lists the nearest names.
        CheckpointError: the files are damaged or of an unknown kind.
        FetchError: bundled weights are not in the cache and cannot be fetched.
        OutOfMemoryError: the model does not fit.
    """
    less = "Choose a smaller precision or model, or end other programs."
    # A caller's inference mode would reach some of the threads that read weights, and not others.
    with torch.inference_mode(False), enough_memory(f"loading {name_or_path}", less):
        loaded = load_checkpoint(
            name_or_path,
            precision=precision,
            device=device,
            chat_template=chat_template,
            profile=profile,
            base=base,
            vision_tower=vision_tower,
        )
    model = Model.of(loaded)
    if image_cache is not None:
        folder = cache_dir() / "features" if image_cache == "auto" else Path(image_cache)
        model.image_encoder.cache.folder = DiskFeatureCache(
            folder.expanduser(), model.feature_fingerprint
        )
    return model


@dataclass(repr=False, eq=False)
class Model(Reranker):
    """A vision-language model that chats and embeds: a checkpoint with its caches. Made by `load`.

    Attributes:
        prefixes: keys and values of prompts that were read before; None: they are not kept.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.prefixes: PrefixCache | None = PrefixCache()

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Model:
        """Return the model of a loaded checkpoint."""
        return cls(**vars(checkpoint))

    @property
    def context_length(self) -> int:
        """The most tokens of a prompt and its answer together."""
        return self.vlm.config.decoder.context_length

    def __repr__(self) -> str:
        millions = self.num_parameters / 1e6
        return f"visavis.Model({self.name!r}, {millions:.0f} M parameters, {self.device})"

    @property
    def num_parameters(self) -> int:
        """How many numbers the model has, packed ones too, shared ones once."""
        tied = self.vlm.decoder.head if self.vlm.config.decoder.tied_head else None
        modules = (module for module in self.vlm.modules() if module is not tied)
        packed = [module for module in modules if isinstance(module, QuantizedLinear)]
        shared = {w.data_ptr(): w.numel() for w in self.vlm.parameters()}
        return sum(shared.values()) + sum(linear.num_weights for linear in packed)

    @property
    def feature_fingerprint(self) -> str:
        """Everything that image features depend on beside the image: weights, sizing, number
        types, device and code version."""
        types = sorted({str(weight.dtype) for weight in self.vlm.parameters()})
        return (
            f"{FEATURE_VERSION}, torch {torch.__version__}, {self.fingerprint}, "
            f"{self.processor}, {types}, {self.device.type}"
        )

    def chat(
        self,
        text: str,
        images: Iterable[Any] = (),
        *,
        history: Iterable[Any] = (),
        stream: bool = False,
        **options: Any,
    ) -> Reply:
        """Answer a message about images, after an optional history.

        Args:
            text: the user's message.
            images: the images it is about, in order: paths, PIL images, arrays or bytes; videos and
                documents too, as paths by their suffix or as `Video` and `Document`.
            history: earlier messages, `Message` or OpenAI-style dicts.
            stream: return at once; iterate the reply for pieces of text.
            options: see `GenerationConfig`.

        Raises:
            InputError: a wrong type, an empty message, images for a text-only model.
            ImageError: an image cannot be read.
            ContextLengthError: the prompt is longer than the model's context.
            OutOfMemoryError: the message says what for, and what would take less.
            NonFiniteError: the model's logits hold NaN or infinity.
        """
        if stream and options.get("beams", 1) > 1:
            raise InputError(
                "beams and stream do not go together: which beam wins is known at the end; leave "
                "one of them."
            )
        answer = self.ask(Prompt.chat(text, images, history), **options)
        answer.reply.pieces = (
            piece for _ in self.engine().run([answer.sequence]) if (piece := answer.update())
        )
        if not stream:
            for _ in answer.reply:
                pass
        return answer.reply

    def chat_many(
        self,
        prompts: Iterable[Any],
        *,
        max_sequences: int = 16,
        progress: bool = False,
        **options: Any,
    ) -> list[Reply]:
        """Answer many prompts, several at a time; each answer is what `chat` gives.

        Args:
            prompts: what `Prompt.of` takes each: texts, dicts of image and text, messages.
            max_sequences: how many answers grow at the same time.
            options: see `GenerationConfig`.

        Raises:
            InputError, ImageError, ContextLengthError, OutOfMemoryError: see `chat`.
            NonFiniteError: the model's logits hold NaN or infinity; the message names the prompt.
        """
        listed = list_prompts(prompts)
        answers = [self.ask(Prompt.of(prompt), **options) for prompt in listed]
        of = {answer.sequence: answer for answer in answers}
        engine = self.engine(max_sequences)
        ended = (one for one in engine.run(of) if of[one].update() is not None and one.done)
        try:
            for _ in track(ended, "answering", weights=[1] * len(of), show=progress):
                pass
        except NonFiniteError as error:
            failed = next(i for i, one in enumerate(answers) if one.sequence.error is error)
            name = name_item(listed[failed])
            message = f"prompt {failed + 1} of {len(listed)} ({name}): {error}"
            raise NonFiniteError(message) from error
        return [answer.reply for answer in answers]

    def ask(self, prompt: Prompt, **options: Any) -> Answer:
        """Return an answer that an `Engine` of this model can grow.

        Raises:
            InputError, ImageError, ContextLengthError: see `chat`.
        """
        started = time.perf_counter()
        config = GenerationConfig.from_kwargs(**options)
        prepared = self.encoder.chat(self._identified(prompt))
        ends = frozenset(self.specials.eot_ids)
        limit = min(config.max_new_tokens, self.context_length - len(prepared.token_ids))
        search, constraint = None, None
        if config.beams > 1:
            search = BeamSearch(config.beam_search, max_new_tokens=limit, stop_ids=ends)
        if config.is_structured:
            constraint = self._grammar(config.schema, config.regex).start()
        sequence = GeneratedSequence(
            prepared,
            Sampler(config.sampling, read=prepared.token_ids, constraint=constraint),
            limit,
            ends,
            search=search,
            token_keys=prepared.token_keys,
        )
        stops = (*config.stop, *filter(None, [self.encoder.stop]))
        return Answer(sequence, self.tokenizer, stops, started=started)

    def engine(self, max_sequences: int = 16) -> Engine:
        """Return an engine for the answers of `ask`, at most `max_sequences` at a time."""
        return Engine(
            self.vlm, self.image_encoder, max_sequences=max_sequences, prefixes=self.prefixes
        )

    def _grammar(self, schema: Any, regex: str | None) -> Grammar:
        config = self.vlm.config.decoder
        return Grammar(
            self.tokenizer,
            vocab_size=config.vocab_size,
            eos_id=min(self.specials.eot_ids),
            schema=schema,
            regex=regex,
        )

    def trace(self, prompt: Any) -> Trace:
        """Return token ids, image slots, hidden states and logits of one prompt.

        Args:
            prompt: an item as in `embed`, rendered with the chat template where there is one; or
                a list of token ids, taken as they are.

        Raises:
            InputError: the model is a dual encoder without decoder; see `chat` for others.
        """
        need_decoder(self.vlm.config, self.name)
        if isinstance(prompt, list) and prompt and all(isinstance(x, int) for x in prompt):
            prepared = PreparedPrompt(token_ids=prompt, loss_mask=[False] * len(prompt))
            self.encoder.checked(prepared)
        else:
            encoder, item = self.encoder, self._identified(Prompt.of(prompt))
            prepared = encoder.chat(item) if encoder.can_chat else encoder.item(item)
        batch = self.image_encoder.pack([prepared])
        with torch.inference_mode():
            hidden = self.vlm(batch)[-1]
            logits = self.vlm.decoder.logits(hidden)
        return Trace(
            token_ids=np.array(prepared.token_ids),
            image_slots=list(prepared.image_slots),
            hidden=hidden.cpu().numpy(),
            logits=logits.cpu().numpy(),
        )
