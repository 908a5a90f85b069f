"""The public face of a loaded model: `load`, then chat, embed and trace.

Turns what users pass into packed batches, calls the core and turns the result back. Knows no
checkpoint layout, template or network of its own; index, server and command line build on it.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch

from visavis.checkpoints.bundled import cache_dir
from visavis.checkpoints.checkpoint import Checkpoint
from visavis.checkpoints.load import load_checkpoint
from visavis.errors import InputError
from visavis.generate.beam_search import BeamSearch, BeamSettings
from visavis.generate.engine import Engine, GeneratedSequence
from visavis.generate.prefix_cache import PrefixCache
from visavis.generate.sampling import Sampler, Sampling
from visavis.generate.streaming import Answer, AnswerSettings, Reply
from visavis.generate.structured_output import Grammar
from visavis.inputs import Image, Page, Prompt, Stored, Video
from visavis.memory import enough_memory
from visavis.model.batch import PackedBatch
from visavis.model.image_input import ImageGrid, ImageInput
from visavis.model.pooling import cut, embed_batch, embedding_dim, kept_dim
from visavis.model.quantized_linear import QuantizedLinear
from visavis.model.vlm import TOWER_BATCH, ImageFeatures
from visavis.processing.chat_template import Encoded
from visavis.processing.collate import batches, pack
from visavis.processing.feature_cache import DiskFeatureCache, FeatureCache
from visavis.processing.image_processor import pixels_of
from visavis.processing.images import content_hash
from visavis.processing.pdf import expand
from visavis.utils import track

DEFAULT_BATCH_TOKENS = 2048
SEEING = 1  # goes up when our code makes something else of the same picture, for what is on disk


@dataclass(frozen=True)
class Trace:
    """What the model sees and computes for one prompt, for parity and for looking inside.

    Attributes:
        token_ids: int64 [T], image placeholders included.
        image_slots: (first position, number of tokens) of each image.
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
    """Load a model by bundled name (`nano`, `smollm2-135m`), folder or .gguf file.

    Args:
        precision: "auto" keeps what a GGUF file quantises so, and computes in bfloat16 where the
            machine can; "int8" and "int4" quantise any checkpoint while it is read; "f32", "bf16"
            and "f16" are what all weights become.
        device: "auto", "cpu" or "cuda".
        chat_template: the chat format, by name, of a checkpoint that does not bring its own.
        profile: how to embed, by name, where the files do not say: "vlm2vec-v1", "vlm2vec-v2" or
            "llave".
        base: the language model that a folder without one was trained on.
        vision_tower: the folder of a vision tower that the checkpoint names and does not hold, or
            the mmproj file of a .gguf model.
        image_cache: a folder that keeps what pictures become from one process to the next, at most
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
    model = Model(loaded)
    if image_cache is not None:
        folder = cache_dir() / "features" if image_cache == "auto" else Path(image_cache)
        model.image_cache.folder = DiskFeatureCache(folder.expanduser(), model.seen_by)
    return model


class Model:
    """A vision-language model that chats and embeds. Made by `load`."""

    def __init__(self, loaded: Checkpoint) -> None:
        self.name = loaded.name
        self.vlm = loaded.vlm
        self.tokenizer = loaded.tokenizer
        self.specials = loaded.specials
        self.profile = loaded.profile
        self.processor = loaded.processor
        self.fingerprint = loaded.fingerprint
        self.files = loaded.files
        self.context_length = loaded.vlm.config.decoder.context_length
        self.embedding_dim = embedding_dim(loaded.vlm, loaded.profile.pooling)
        self.device = next(loaded.vlm.parameters()).device
        self.image_cache = FeatureCache()
        self.prefixes: PrefixCache | None = PrefixCache()
        self.encoder = loaded.encoder

    def __repr__(self) -> str:
        millions = self.num_parameters / 1e6
        return f"visavis.Model({self.name!r}, {millions:.0f} M parameters, {self.device})"

    @property
    def num_parameters(self) -> int:
        """How many numbers the model has, packed ones too, shared ones once."""
        decoder = self.vlm.decoder
        tied = decoder.head if decoder.config.tied_head else None
        modules = (module for module in self.vlm.modules() if module is not tied)
        packed = [module for module in modules if isinstance(module, QuantizedLinear)]
        shared = {w.data_ptr(): w.numel() for w in self.vlm.parameters()}
        return sum(shared.values()) + sum(linear.num_weights for linear in packed)

    @property
    def seen_by(self) -> str:
        """All that decides what a picture becomes: weights, sizes, number types, device, code."""
        types = sorted({str(weight.dtype) for weight in self.vlm.parameters()})
        return (
            f"{SEEING}, torch {torch.__version__}, {self.fingerprint}, {self.processor}, {types}, "
            f"{self.device.type}"
        )

    @property
    def takes_images(self) -> bool:
        return self.vlm.tower is not None

    def chat(
        self,
        text: str,
        images: Iterable[Any] = (),
        *,
        history: Iterable[Any] = (),
        stream: bool = False,
        **settings: Unpack[AnswerSettings],
    ) -> Reply:
        """Answer a message about images, after an optional history.

        Args:
            text: the user's message.
            images: pictures it is about, in order: paths, PIL images, arrays or bytes; videos and
                documents too, as paths by their suffix or as `Video` and `Document`.
            history: earlier messages, `Message` or OpenAI-style dicts.
            stream: return at once; iterate the reply for pieces of text.
            settings: see `AnswerSettings`.

        Raises:
            InputError: a wrong type, an empty message, images for a text-only model.
            ImageError: a picture cannot be read.
            ContextLengthError: the prompt is longer than the model's context.
            OutOfMemoryError: the message says what for, and what would take less.
        """
        if stream and settings.get("beams", 1) > 1:
            raise InputError(
                "beams and stream do not go together: which beam wins is known at the end; leave "
                "one of them."
            )
        answer = self.ask(Prompt.chat(text, images, history), **settings)
        engine = Engine(self.vlm, prefixes=self.prefixes)
        answer.reply.pieces = (
            piece for _ in engine.run([answer.sequence]) if (piece := answer.update())
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
        **settings: Unpack[AnswerSettings],
    ) -> list[Reply]:
        """Answer many prompts, several at a time; each answer is what `chat` gives.

        Args:
            prompts: what `Prompt.of` takes each: texts, dicts of image and text, messages.
            max_sequences: how many answers grow at the same time.
            settings: see `AnswerSettings`.

        Raises:
            InputError, ImageError, ContextLengthError, OutOfMemoryError: see `chat`.
        """
        listed = _listed(prompts)
        answers = [self.ask(Prompt.of(prompt), **settings) for prompt in listed]
        of = {answer.sequence: answer for answer in answers}
        engine = Engine(self.vlm, max_sequences=max_sequences, prefixes=self.prefixes)
        ended = (one for one in engine.run(of) if of[one].update() is not None and one.done)
        for _ in track(ended, "answering", weights=[1] * len(of), show=progress):
            pass
        return [answer.reply for answer in answers]

    def ask(self, prompt: Prompt, **settings: Unpack[AnswerSettings]) -> Answer:
        """Return an answer that an `Engine` of this model can grow.

        Raises:
            InputError, ImageError, ContextLengthError: see `chat`.
        """
        started = time.perf_counter()
        limit = settings.pop("max_new_tokens", 256)
        if limit < 1:
            raise InputError(f"max_new_tokens is {limit}, expected at least 1.")
        beams = BeamSettings(
            settings.pop("beams", 1),
            settings.pop("length_penalty", 1.0),
            settings.pop("early_stopping", False),
        )
        stop = settings.pop("stop", ())
        stops = [stop] if isinstance(stop, str) else list(stop)
        schema, regex = settings.pop("schema", None), settings.pop("regex", None)
        constraint = None
        if schema is not None or regex is not None:
            constraint = self._grammar(schema, regex).start()
        drawn = Sampling(**settings)  # type: ignore[misc]  # what is left are its fields
        if beams.number > 1 and (drawn != Sampling() or constraint is not None):
            raise InputError(
                f"beams is {beams.number}: the likeliest answer is searched for, which goes with "
                "no temperature, cuts, penalty, bias, seed, schema or regex; leave them, or beams."
            )
        prompt = expand(prompt)
        encoded = self.encoder.chat(prompt)
        read, stops_at = encoded.token_ids, frozenset(self.specials.eot_ids)
        limit = min(limit, self.context_length - len(read))
        search = None
        if beams.number > 1:
            search = BeamSearch(beams, max_new_tokens=limit, stop_ids=stops_at)
        sampler = Sampler(drawn, read=read, constraint=constraint)
        sequence = GeneratedSequence(
            lambda: self._batch([(prompt, encoded)]),
            sampler,
            limit,
            stops_at,
            search=search,
            names=self._names(prompt, encoded),
        )
        stops += [self.encoder.stop] if self.encoder.stop else []
        return Answer(sequence, self.tokenizer, tuple(filter(None, stops)), started=started)

    def _names(self, prompt: Prompt, encoded: Encoded) -> tuple[Hashable, ...]:
        """Return what each token is: its id, or a place in an image of some content."""
        names: list[Hashable] = list(encoded.token_ids)
        alone = self.encoder.alone(prompt)
        for visual, (start, count) in zip(prompt.visuals, encoded.image_slots, strict=True):
            content = f"{content_hash(visual)}:{alone}"
            names[start : start + count] = ((content, place) for place in range(count))
        return tuple(names)

    def _grammar(self, schema: Any, regex: str | None) -> Grammar:
        config = self.vlm.config.decoder
        return Grammar(
            self.tokenizer,
            vocab_size=config.vocab_size,
            eos_id=min(self.specials.eot_ids),
            schema=schema,
            regex=regex,
        )

    def embed(
        self,
        items: Any,
        *,
        instruction: str | None = None,
        dim: int | None = None,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> np.ndarray:
        """Return one unit vector per item, float32 [N, D], in the order of the items.

        Args:
            items: a list of what `Prompt.of` takes (a str is text, a Path a picture, or by its
                suffix a video or document), or one item. A document is one item of all its pages.
            instruction: what the vectors are for; joined to each item's text as the model's
                profile says.
            dim: keep only the first `dim` numbers, normalised again.
            batch_tokens: tokens per forward pass; more is faster until memory runs out.
            progress: show a bar on stderr.

        Raises:
            InputError, ImageError: an item cannot be used; the message names it.
            ContextLengthError: an item is longer than the model's context.
            OutOfMemoryError: the message says what for, and what would take less.
        """
        batch_tokens = DEFAULT_BATCH_TOKENS if batch_tokens is None else batch_tokens
        if batch_tokens < 1:
            raise InputError(f"batch_tokens is {batch_tokens}, expected 1 or more.")
        dim = kept_dim(dim, self.embedding_dim)
        listed = list(items) if isinstance(items, list | tuple | np.ndarray) else [items]
        if isinstance(items, np.ndarray) and items.ndim in (2, 3):
            listed = [items]
        prompts = [expand(Prompt.of(item)) for item in listed]
        encoded = [self.encoder.item(prompt, instruction) for prompt in prompts]
        vectors = np.empty((len(prompts), dim), np.float32)
        lengths = [len(one.token_ids) for one in encoded]
        groups = list(batches(lengths, batch_tokens))
        for group in track(groups, "embedding", weights=[len(g) for g in groups], show=progress):
            batch = self._batch([(prompts[i], encoded[i]) for i in group])
            with enough_memory(
                f"embedding {len(group)} items of {batch.num_tokens} tokens, "
                f"{len(batch.image_counts)} images",
                f"Lower batch_tokens (it is {batch_tokens}), or shorten what is long.",
            ):
                found = embed_batch(self.vlm, batch, self.profile.pooling)
                vectors[group] = cut(found, dim).cpu().numpy()
        return vectors

    def trace(self, prompt: Any) -> Trace:
        """Return token ids, image slots, hidden states and logits of one prompt.

        Args:
            prompt: an item as in `embed`, rendered with the chat template where there is one; or
                a list of token ids, taken as they are.
        """
        if isinstance(prompt, list) and prompt and all(isinstance(x, int) for x in prompt):
            encoded = Encoded(token_ids=prompt, image_slots=[], loss_mask=[False] * len(prompt))
            self.encoder.checked(encoded)
            batch = pack([encoded])
        else:
            prompt = expand(Prompt.of(prompt))
            encoder = self.encoder
            encoded = encoder.chat(prompt) if encoder.can_chat else encoder.item(prompt)
            batch = self._batch([(prompt, encoded)])
        with torch.inference_mode():
            hidden = self.vlm(batch)[-1]
            logits = self.vlm.decoder.logits(hidden)
        return Trace(
            token_ids=np.array(encoded.token_ids),
            image_slots=list(encoded.image_slots),
            hidden=hidden.cpu().numpy(),
            logits=logits.cpu().numpy(),
        )

    def see(self, visuals: Sequence[Image | Video], alone: Sequence[bool]) -> list[ImageFeatures]:
        """Return what pictures and videos become before the decoder; equal ones once.

        Decoding and resizing run in threads. Results are kept by content, within a byte budget.

        Args:
            alone: of each whether it is its prompt's only one, which some models tile more finely.

        Returns:
            image tokens [n, D] and mean tower feature [W] of each.
        """
        assert self.processor is not None
        processor = self.processor
        pairs = list(zip(visuals, alone, strict=True))
        keys = [f"{content_hash(visual)}:{single}" for visual, single in pairs]
        found: dict[str, ImageFeatures] = {}
        missing = {}
        for key, pair in zip(keys, pairs, strict=True):
            if (kept := self.image_cache.get(key)) is not None:
                found[key] = (kept[0].to(self.device), kept[1].to(self.device))
            else:
                missing[key] = pair
        todo = list(missing.items())
        chunks = [todo[first : first + TOWER_BATCH] for first in range(0, len(todo), TOWER_BATCH)]
        with ThreadPoolExecutor(max_workers=2) as pool:

            def prepare(number: int) -> list[Future[tuple[np.ndarray, ImageGrid]]]:
                chunk = chunks[number] if number < len(chunks) else []
                return [
                    pool.submit(pixels_of, visual, processor, single)
                    for _, (visual, single) in chunk
                ]

            waiting = prepare(0)
            for number, chunk in enumerate(chunks):
                ready = [future.result() for future in waiting]
                waiting = prepare(number + 1)  # decoded while the tower looks at this chunk
                pixels = [torch.from_numpy(array).to(self.device) for array, _ in ready]
                with torch.inference_mode():
                    seen = self.vlm.see(
                        [
                            ImageInput(one, shape)
                            for one, (_, shape) in zip(pixels, ready, strict=True)
                        ]
                    )
                for (key, (visual, _)), (tokens, mean) in zip(chunk, seen, strict=True):
                    found[key] = (tokens.clone(), mean.clone())
                    if not _changed(visual, key):
                        self.image_cache.put(key, found[key])
        return [found[key] for key in keys]

    def _batch(self, pairs: Sequence[tuple[Prompt, Encoded]]) -> PackedBatch:
        """Pack encoded prompts and compute their image tokens."""
        batch = pack([encoded for _, encoded in pairs])
        visuals = [visual for prompt, _ in pairs for visual in prompt.visuals]
        if visuals:
            alone = [self.encoder.alone(prompt) for prompt, _ in pairs for _ in prompt.visuals]
            with enough_memory(
                f"looking at {len(visuals)} pictures and videos", "Use fewer or smaller ones."
            ):
                seen = self.see(visuals, alone)
            batch.image_tokens = torch.cat([tokens for tokens, _ in seen])
            batch.image_counts = tuple(len(tokens) for tokens, _ in seen)
            batch.image_means = torch.stack([mean for _, mean in seen])
        return batch.to(self.device)


def _listed(prompts: Iterable[Any]) -> list[Any]:
    if isinstance(prompts, str | bytes | Mapping):
        raise InputError(f"prompts are one {type(prompts).__name__}, expected a list of prompts.")
    return list(prompts)


def _changed(visual: Image | Video, key: str) -> bool:
    """Return whether a file holds something else by now than what its key was made of."""
    kept_elsewhere = isinstance(visual.source, Path | Page | Stored)
    return kept_elsewhere and not key.startswith(content_hash(visual))
