"""Memory and compute estimates of a training stage, from shapes and a few samples.

    weights        each tensor in its type
    gradients      4 bytes a trained number; AdamW's two means 8 more, a running mean 4 more
    activations    of the T tokens of one pass, in each block of width D, of F in the feed-forward
                   part (twice F gated), Q numbers of queries, keys and values, c bytes a number:
                       8 D + c (3 D + Q + 2 F, gated 4 F)          a token
                   recomputed (`checkpointing`): 4 D in each block, and one block whole
    scores         c + 8 bytes for each word of the vocabulary, a learned token of one pass

    operations     2 a weight forward, 2 back to the input, 2 to a trained weight (so 6 N a token
                   where all N are trained); 2 more where a pass is done twice, which GradCache and
                   `checkpointing` each do; 2 a weight of the vision tower for each of its patches

Not counted: attention scores, copies of batches, fragments of memory, work beside the model. Of
images only sizes are read, not pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from torch import nn

from visavis.data.datasets import is_made
from visavis.data.examples import CHARACTERS_PER_TOKEN, Conversation, Sample
from visavis.errors import VisavisError
from visavis.inputs import Image, Prompt, Text
from visavis.model.config import DecoderConfig, Qwen2VLTowerConfig, ViTConfig, VLMConfig
from visavis.model.image_input import ImageGrid
from visavis.model.image_tokens import count_tokens
from visavis.model.vlm import VLM
from visavis.processing.config import ImageProcessorConfig
from visavis.processing.image_processor import grid_of, image_processor
from visavis.processing.images import image_size
from visavis.train.metrics import flops_per_token

LOOKED_AT = 24  # samples of each source
PER_TURN = 6  # tokens that a chat format puts around a turn
OPTIMIZER_BYTES = 8


@dataclass(frozen=True)
class Reader:
    """Counts the tokens of samples.

    Args:
        words: counts those of a text; None: a token for every four characters.
    """

    config: VLMConfig
    processor: ImageProcessorConfig | None
    words: Callable[[str], int] | None = None

    def text(self, text: str) -> int:
        if self.words is None:
            return len(text) // CHARACTERS_PER_TOKEN + 1
        return self.words(text)

    def prompt(self, prompt: Prompt) -> Length:
        """Return how long a prompt is.

        Raises:
            ImageError, InputError: an image cannot be read.
        """
        found = Length()
        depends = self.processor and image_processor(self.processor).depends_on_image_count
        alone = len(prompt.visuals) == 1 or not depends
        for message in prompt.messages:
            found.tokens += PER_TURN
            for part in message.parts:
                if isinstance(part, Text):
                    tokens = self.text(part.text)
                    found.tokens += tokens
                    found.learned += tokens * (message.role == "assistant")
        for visual in prompt.visuals:
            if isinstance(visual, Image) and not is_made(visual):
                image_size(visual)  # that it is there, even where its size does not matter
            if self.processor is None:
                continue
            shape = grid_of(visual, self.processor, alone)
            found.tokens += count_tokens(self.config, shape)
            found.patches += self._patches(shape)
        return found

    def _patches(self, shape: ImageGrid) -> int:
        """Return how many patches the vision tower reads of an image."""
        tower = self.config.tower
        return 0 if tower is None else tower.num_patches(shape)


@dataclass
class Length:
    """Of a prompt or of a sample's prompts together."""

    tokens: int = 0
    learned: int = 0  # of an assistant's answers
    patches: int = 0  # for the vision tower
    longest: int = 0  # tokens of the longest sequence

    def __add__(self, other: Length) -> Length:
        return Length(
            self.tokens + other.tokens,
            self.learned + other.learned,
            self.patches + other.patches,
            max(self.longest, other.longest, other.tokens),
        )


@dataclass
class Survey:
    """Statistics of a source, estimated from a few of its samples.

    Attributes:
        size: samples of the source.
        mean: tokens, learned tokens and patches of a sample; None: none could be read.
        longest: tokens of the longest sequence that was looked at, and the sample's id.
    """

    size: int
    mean: tuple[float, float, float] | None = None
    longest: tuple[int, str] = (0, "")
    problems: list[str] = field(default_factory=list)


def survey(
    samples: Sequence[Sample],
    kind: type[Sample],
    reader: Reader,
    negatives: int | None = None,
    check: Callable[[Any], None] | None = None,
) -> Survey:
    """Look at some samples of a source, at even distances.

    Args:
        kind: the class that they are expected to have.
        negatives: number of each sample's negatives that are read, at most.
        check: raises a VisavisError for a sample that cannot be trained on.
    """
    found = Survey(len(samples))
    lengths = []
    for number in range(0, found.size, max(1, found.size // LOOKED_AT)):
        try:
            sample = samples[number]
        except VisavisError as error:
            found.problems.append(str(error))
            continue
        if not isinstance(sample, kind):
            chat, match = "a conversation", "a query with its target"
            what, wanted = (chat, match) if isinstance(sample, Conversation) else (match, chat)
            found.problems.append(f"the sample {sample.id!r} is {what}, expected {wanted}")
            break
        try:
            length = _length(sample, reader, negatives)
            if check is not None:
                check(sample)
        except VisavisError as error:
            found.problems.append(f"the sample {sample.id!r} cannot be used: {error}")
            continue
        found.longest = max(found.longest, (length.longest, sample.id))
        lengths.append((length.tokens, length.learned, length.patches))
    if lengths:
        tokens, learned, patches = (fmean(column) for column in zip(*lengths, strict=True))
        found.mean = (tokens, learned, patches)
    return found


def _length(sample: Sample, reader: Reader, negatives: int | None) -> Length:
    if isinstance(sample, Conversation):
        prompts: tuple[Prompt, ...] = (sample.prompt,)
        instructions = ""
    else:
        prompts = (sample.query, sample.target, *sample.negatives[:negatives])
        instructions = f"{sample.instruction} {sample.target_instruction}".strip()
    total = Length()
    for prompt in prompts:
        total += reader.prompt(prompt)
    if instructions:
        total += Length(tokens=reader.text(instructions))
    return total


# ---- memory --------------------------------------------------------------------------------------


def weight_bytes(vlm: VLM) -> int:
    """Return the bytes of all tensors, those of the meta device too."""
    tensors = {id(t): t for t in (*vlm.parameters(), *vlm.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def trained_bytes(vlm: VLM, *, ema: bool) -> tuple[int, int]:
    """Return the bytes of gradients, and those of the optimiser's and the running means."""
    trained = sum(p.numel() for p in vlm.parameters() if p.requires_grad)
    return 4 * trained, (OPTIMIZER_BYTES + 4 * ema) * trained


def activation_bytes(
    config: DecoderConfig, tokens: int, number_bytes: int, *, recomputed: bool
) -> int:
    """Return the bytes of activations that blocks keep for the backward pass of `tokens` tokens."""
    blocks = [_block_bytes(config, layer, number_bytes) for layer in range(config.num_layers)]
    if recomputed:
        return tokens * (4 * config.width * config.num_layers + max(blocks))
    return tokens * sum(blocks)


def _block_bytes(config: DecoderConfig, layer: int, number_bytes: int) -> int:
    heads, kv_heads, ffn = (
        config.per_layer(number, layer)
        for number in (config.num_heads, config.num_kv_heads, config.ffn_width)
    )
    width, qkv = config.width, (heads + 2 * kv_heads) * config.head_dim
    return 8 * width + number_bytes * (3 * width + qkv + ffn * (4 if config.gated else 2))


def tower_bytes(config: VLMConfig, patches: int, first: int) -> int:
    """Return the bytes of float32 activations of a vision tower trained from block `first` on."""
    tower = config.tower
    if not isinstance(tower, ViTConfig | Qwen2VLTowerConfig):
        return 0
    block = 4 * (9 * tower.width + 2 * tower.ffn_width)
    return patches * block * (tower.num_layers - first)


def score_bytes(config: DecoderConfig, learned: int, number_bytes: int) -> int:
    """Return the bytes of the scores over the vocabulary at `learned` positions."""
    return learned * config.vocab_size * (number_bytes + 8)


# ---- time ----------------------------------------------------------------------------------------


def step_operations(
    vlm: VLM, mean: tuple[float, float, float], samples: float, *, cached: bool, recomputed: bool
) -> float:
    """Return the operations of a step.

    Args:
        mean: tokens, learned tokens and patches of a sample.
        samples: of a step.
        cached: whether vectors are made twice (GradCache).
    """
    tokens, learned, patches = (samples * number for number in mean)
    forward = 2.0 * _weights(vlm.decoder.blocks)
    each = flops_per_token(vlm.decoder) + forward * (cached + recomputed)
    total = tokens * each
    if not cached:  # every word is scored where one is learned
        total += 6.0 * learned * vlm.decoder.head.weight.numel()
    if vlm.tower is not None:
        numbers = sum(p.numel() for p in vlm.tower.parameters())
        trained = sum(p.numel() for p in vlm.tower.parameters() if p.requires_grad)
        total += patches * (2.0 * numbers * (1 + cached) + 4.0 * trained)
    return total


def _weights(module: nn.Module) -> int:
    """Return the weights of all matrices, adapters left out."""
    weights = 0
    for one in module.modules():
        if isinstance(size := getattr(one, "in_features", None), int):
            weights += size * int(getattr(one, "out_features", 0))
    return weights
