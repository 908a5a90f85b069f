"""Frozen configs of all parts of a model: shapes and switches."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from visavis.model.image_input import ImageGrid

PerLayer = int | tuple[int, ...]  # one number for all layers, or one per layer (OpenELM)


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context."""

    kind: Literal["linear", "llama3", "factors"]
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_context: int = 8192  # llama3, factors: context the model was first trained with
    factors: tuple[float, ...] = ()  # factors: one divisor per frequency (GGUF rope_freqs, Phi-3)
    magnitude: float = 1.0  # what cosines and sines are multiplied by (Phi-3's longrope)


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only language model; defaults are the Llama family."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: PerLayer
    num_kv_heads: PerLayer
    head_dim: int
    ffn_width: PerLayer
    context_length: int
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # added to the norm weight (Gemma: 1)
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True  # gate * up (SwiGLU, GeGLU) instead of a single up projection
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    head_bias: bool = False
    parallel_block: bool = False  # attention and FFN read the same norm and are summed (Phi-2)
    rope_base: float = 10000.0
    rope_fraction: float = 1.0  # share of head_dim that rotates (Phi-2, StableLM: < 1)
    rope_scaling: RopeScaling | None = None
    mrope_sections: tuple[int, ...] = ()  # frequencies per axis (time, height, width), Qwen2-VL
    mrope_interleaved: bool = False  # axes take turns instead of blocks of frequencies (Qwen3-VL)
    qk_norm: bool = False  # RMS norm on each head's query and key
    embedding_scale: float = 1.0  # token embeddings are multiplied by this (Gemma: sqrt(width))
    tied_head: bool = True
    sliding_window: int = 0  # tokens a query may look back, itself included; 0 = all
    causal: bool = True  # False: every token sees its whole sequence (PaliGemma's prefix)
    norm_bias: bool = True  # of layer norms
    embed_norm: bool = False  # on the embeddings instead of before the first attention (ModernBERT)
    local_layers: tuple[int, ...] = ()  # numbers from 0 of layers with a window of their own
    local_window: int = 0  # theirs, as `sliding_window`; without `causal` in both directions
    local_rope_base: float = 10000.0

    def per_layer(self, value: PerLayer, layer: int) -> int:
        """Return the number for one layer of a field that may differ per layer."""
        return value[layer] if isinstance(value, tuple) else value

    @property
    def rotary_dim(self) -> int:
        share = round(self.head_dim * self.rope_fraction, 6)  # 104 * (30 / 104) is 29.999…
        return int(share) // 2 * 2


@dataclass(frozen=True)
class ViTConfig:
    """CLIP, SigLIP and DINOv2 in one config; the flags are their differences."""

    image_size: int
    patch_size: int
    width: int
    num_layers: int
    num_heads: int
    ffn_width: int
    activation: Literal["quick_gelu", "gelu", "gelu_tanh", "silu"]
    norm_eps: float
    kind: Literal["vit"] = "vit"
    class_token: bool = True
    num_registers: int = 0
    patch_bias: bool = False
    pre_norm: bool = False  # CLIP: a norm on the embeddings before the first block
    post_norm: bool = True  # a norm after the last block
    layer_scale: bool = False  # DINOv2
    gated_ffn: bool = False  # DINOv2-giant: SwiGLU
    pooling: Literal["mean", "class", "attention"] = "mean"  # of dual encoders: CLIP's, SigLIP's
    position_antialias: bool = False  # DINOv2 with registers: how positions are resized
    position_buckets: bool = False  # Idefics3: each patch takes the nearest learned position
    norm_output: bool = False  # the last hidden state is given after `post_norm`
    norm: Literal["layer", "rms"] = "layer"  # of blocks; InternViT-6B: rms
    qkv_bias: bool = True
    qk_norm: bool = False  # RMS norm on all heads' queries and keys together (InternViT-6B)
    any_resolution: ClassVar[bool] = False

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    def num_patches(self, shape: ImageGrid) -> int:
        """Return how many patches the tower reads of an image or video."""
        return shape.views * self.grid**2

    @property
    def num_prefix_tokens(self) -> int:
        return int(self.class_token) + self.num_registers


@dataclass(frozen=True)
class EfficientNetConfig:
    """EfficientNet-Lite 0-4 (Tan & Le 2019; Lite: no squeeze-excite, ReLU6) as a vision tower."""

    variant: int
    image_size: int
    kind: Literal["efficientnet_lite"] = "efficientnet_lite"
    any_resolution: ClassVar[bool] = False
    num_prefix_tokens: ClassVar[int] = 0

    @property
    def grid(self) -> int:
        return -(-self.image_size // 32)

    def num_patches(self, shape: ImageGrid) -> int:
        """Return how many patches the tower gives of an image or video."""
        return shape.views * self.grid**2

    @property
    def width(self) -> int:
        return 1280


@dataclass(frozen=True)
class Qwen2VLTowerConfig:
    """The towers of any resolution of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and LLaVA-OneVision-1.5:
    patches of one or two frames, rotary positions.

    Args:
        temporal_size: frames in a patch.
        merge: side of the square of patches that become one token.
        window: side, in tokens, of the squares that attention is limited to; 0: whole images.
        full_blocks: numbers of the blocks that attend to whole images all the same, from 0.
        tokens_per_second: positions of M-RoPE that a second of a video takes; 0: each pair of
            frames takes one.
        position_side: side of the table of learned positions that is stretched to an image's
            patches; 0: none.
        deepstack_blocks: numbers of the blocks after which features are taken beside the last
            ones, for the decoder's first layers (DeepStack, Meng et al. 2024).
        class_token: a class token before each image or frame, and a norm before the first block
            (RICE-ViT, `vision/rice.py`).
    """

    width: int
    num_layers: int
    num_heads: int
    ffn_width: int
    patch_size: int = 14
    temporal_size: int = 2
    merge: int = 2
    activation: Literal["quick_gelu", "gelu", "gelu_tanh", "silu"] = "quick_gelu"
    norm_eps: float = 1e-6
    kind: Literal["qwen2_vl"] = "qwen2_vl"
    norm: Literal["layer", "rms"] = "layer"
    gated_ffn: bool = False
    patch_bias: bool = False
    window: int = 0
    full_blocks: tuple[int, ...] = ()
    tokens_per_second: int = 0
    position_side: int = 0
    deepstack_blocks: tuple[int, ...] = ()
    class_token: bool = False
    any_resolution: ClassVar[bool] = True
    num_prefix_tokens: ClassVar[int] = 0

    @property
    def patch_width(self) -> int:
        """Numbers in one patch."""
        return 3 * self.temporal_size * self.patch_size**2

    def num_patches(self, shape: ImageGrid) -> int:
        """Return how many patches the tower reads of an image or video."""
        return shape.frames * shape.rows * shape.columns


@dataclass(frozen=True)
class MixtureConfig:
    """Two ViTs on the same pixels, their features side by side in the channels (TinyLLaVA)."""

    first: ViTConfig
    second: ViTConfig
    kind: Literal["mixture"] = "mixture"
    any_resolution: ClassVar[bool] = False

    @property
    def image_size(self) -> int:
        return self.first.image_size

    @property
    def grid(self) -> int:
        return self.first.grid

    @property
    def width(self) -> int:
        return self.first.width + self.second.width

    @property
    def num_prefix_tokens(self) -> int:
        return self.first.num_prefix_tokens

    def num_patches(self, shape: ImageGrid) -> int:
        """Return how many patches each of the two ViTs reads of an image or video."""
        return self.first.num_patches(shape)


@dataclass(frozen=True)
class NaFlexConfig:
    """SigLIP 2's tower for images of any aspect ratio (NaFlex, Tschannen et al. 2025).

    Args:
        num_positions: learned positions, a square of them, resized to each image's rows and
            columns of patches.
    """

    patch_size: int
    num_positions: int
    width: int
    num_layers: int
    num_heads: int
    ffn_width: int
    activation: Literal["quick_gelu", "gelu", "gelu_tanh", "silu"] = "gelu_tanh"
    norm_eps: float = 1e-6
    kind: Literal["naflex"] = "naflex"
    any_resolution: ClassVar[bool] = True
    num_prefix_tokens: ClassVar[int] = 0
    gated_ffn: ClassVar[bool] = False
    layer_scale: ClassVar[bool] = False
    norm: ClassVar[Literal["layer", "rms"]] = "layer"
    qkv_bias: ClassVar[bool] = True
    qk_norm: ClassVar[bool] = False

    def num_patches(self, shape: ImageGrid) -> int:
        """Return how many patches the tower reads of an image or video."""
        return shape.frames * shape.rows * shape.columns


TowerConfig = ViTConfig | EfficientNetConfig | Qwen2VLTowerConfig | MixtureConfig | NaFlexConfig
TOWERS: dict[str, type[TowerConfig]] = {
    "vit": ViTConfig,
    "efficientnet_lite": EfficientNetConfig,
    "qwen2_vl": Qwen2VLTowerConfig,
    "mixture": MixtureConfig,
    "naflex": NaFlexConfig,
}


@dataclass(frozen=True)
class BertConfig:
    """A BERT encoder as text tower (Devlin et al. 2019).

    Args:
        context_length: learned positions, the most tokens of one pass.
        window: tokens of one pass, `[CLS]` and `[SEP]` included; longer texts take several.
        cls_id, sep_id: token ids that stand around each text.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    ffn_width: int
    context_length: int
    window: int
    cls_id: int
    sep_id: int
    norm_eps: float = 1e-12
    kind: ClassVar[str] = "BERT"


@dataclass(frozen=True)
class ClipTextConfig:
    """The text tower of CLIP (Radford et al. 2021) or SigLIP (Zhai et al. 2023).

    Args:
        context_length: learned positions, the most tokens of a text, special ones included.
        causal: a token sees those before it (CLIP) instead of the whole text (SigLIP).
        pooling: the token that stands for the text: the first `eos_id`, the first of the highest
            id (what CLIP's code takes where its config says 2), or the last.
        padded: the side on which texts are filled up to `context_length` with padding tokens,
            which the model was trained to read (SigLIP); empty: they are not.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    ffn_width: int
    context_length: int
    activation: Literal["quick_gelu", "gelu", "gelu_tanh", "silu", "relu"]
    norm_eps: float
    causal: bool
    pooling: Literal["eos", "highest", "last"]
    eos_id: int = -1
    padded: Literal["", "right", "left"] = ""
    kind: Literal["CLIP"] = "CLIP"
    gated_ffn: ClassVar[bool] = False
    layer_scale: ClassVar[bool] = False
    norm: ClassVar[Literal["layer", "rms"]] = "layer"
    qkv_bias: ClassVar[bool] = True
    qk_norm: ClassVar[bool] = False


TextTowerConfig = BertConfig | ClipTextConfig


@dataclass(frozen=True)
class ConnectorConfig:
    """From tower features to the decoder's width; the kinds are those of `connectors.CONNECTORS`.

    `linear` is one layer; `mlp` is LLaVA's mlpNx_gelu with `depth` layers. `shuffle` > 1 first
    folds shuffle x shuffle neighbouring patches into channels (pixel shuffle), cutting the number
    of image tokens by its square; in `merger` (Qwen2-VL) they stand next to one another already.
    `mixture` has an MLP for each half of a mixture tower; `resampler` and `qformer` have `depth`
    blocks. `words` is `linear`, preceded by `num_queries` tokens that spell the words of a list
    whose vectors are nearest to the image's, those within `word_margin` of the nearest.
    """

    kind: str
    in_width: int
    out_width: int
    depth: int = 1
    shuffle: int = 1
    hidden_width: int = 0  # mlp: 0 is out_width, as in LLaVA; qformer: its width, 64 a head
    input_norm: bool = False  # mlp: a layer norm on the (folded) tower features
    bias: bool = True  # linear, mlp: of their layers
    num_queries: int = 0  # resampler, qformer: learned queries; words: spelling tokens
    num_words: int = 0  # words: length of the list
    rms_norm: bool = False  # merger: its norm is an RMS norm (Qwen2.5-VL)
    norm_eps: float = 1e-6  # merger: of its norm
    deepstack: int = 0  # merger: further mergers, for the decoder's first layers (Qwen3-VL)
    word_width: int = 0  # words: numbers of an embedding vector
    word_margin: float = 0.0  # words: how much farther than the nearest a word may be; 0: any


@dataclass(frozen=True)
class ImageLayoutConfig:
    """How the tokens of an image's views, or of a video's frames, become one run of tokens.

    `flat` lays view after view. `spatial` (LLaVA 1.6) puts the tiles of an image back together
    after the base view. `hd` is Phi-3.5-vision's, see `image_tokens.py`.

    Args:
        unpad: cut off what padded the image to its canvas.
        newline: a learned vector ends each row of tiles, or a lone base view.
        max_tiles: shrink images whose tokens outnumber those of N tiles (anyres_max_N).
        round_unpad: round the unpadded size to seven places before cutting, as transformers does.
        video_newline: where the learned vector stands in a video: at its end, after each row,
            after each frame, or nowhere.
        video_pool: side of the square of a frame's tokens that become one.
        video_pool_mode: how they do; `bilinear` rounds the smaller side up, the others down.
    """

    kind: Literal["flat", "spatial", "hd"] = "flat"
    unpad: bool = False
    newline: bool = False
    max_tiles: int = 0
    round_unpad: bool = False
    video_newline: Literal["one_token", "grid", "frame", "no_token"] = "one_token"
    video_pool: int = 1
    video_pool_mode: Literal["bilinear", "average", "max"] = "bilinear"


@dataclass(frozen=True)
class HeadConfig:
    """An optional projection from pooled hidden states to the embedding space.

    `layers` are hidden states by number: 0 is the input embeddings, n the output of block n;
    the last one passes the final norm. Means over text tokens and over image tokens are
    projected apart and summed. With `tower_width` the image side reads the mean tower feature, of
    that width, instead: a narrow connector that learned to speak does not pass all of it on, and
    images alone need no pass through the decoder. With `text_width` the text side reads the
    pooled vector of the text tower, of that width, and `layers` is empty. With `num_classes` the
    image side starts from the names of the classes that the vision tower recognises
    (`embedding_head.ClassNames`). With `scores` it is the head of a dual encoder without decoder
    (`embedding_head.DualHead`), whose cosines become probabilities by a softmax over texts (CLIP)
    or a sigmoid of each (SigLIP).
    """

    layers: tuple[int, ...]
    dim: int
    tower_width: int = 0
    text_width: int = 0
    num_classes: int = 0
    scores: Literal["", "softmax", "sigmoid"] = ""


@dataclass(frozen=True)
class VLMConfig:
    """A whole model. `select_layer` counts hidden states of the tower from the end (-1 = last).

    `video_token_id` is the placeholder of videos where it differs from that of images.
    `drop_first_token` leaves out a patch, the upper left one, of towers without class token: what
    TinyLLaVA's models of SigLIP were trained with (docs/quirks.md), and no new model should.
    A dual encoder without decoder has `no_decoder` as its decoder.
    `multi_vector_dim` is the length of ColPali's vectors of tokens (Faysse et al. 2024); 0: none.
    """

    decoder: DecoderConfig
    tower: TowerConfig | None = None
    connector: ConnectorConfig | None = None
    head: HeadConfig | None = None
    image_token_id: int = -1
    select_layer: int = -1
    select_feature: Literal["patch", "class_patch"] = "patch"
    merge: ImageLayoutConfig = ImageLayoutConfig()
    video_token_id: int = -1
    drop_first_token: bool = False
    text_tower: TextTowerConfig | None = None
    multi_vector_dim: int = 0

    @property
    def has_decoder(self) -> bool:
        """Whether there is a language model; without one nothing but `embed` works."""
        return self.decoder.num_layers > 0

    @property
    def features_per_image(self) -> int:
        """Features of one view that the connector reads."""
        tower = self.tower
        assert tower is not None and not tower.any_resolution, "it depends on the image"
        prefix = tower.num_prefix_tokens if self.select_feature == "class_patch" else 0
        return tower.num_patches(ImageGrid()) - self.drop_first_token + prefix


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as plain JSON types."""
    return dataclasses.asdict(config)


def vlm_config_from_dict(data: dict[str, Any]) -> VLMConfig:
    """Rebuild a `VLMConfig` from `to_dict`'s output after a trip through JSON.

    Raises:
        TypeError: a field is missing or unknown.
    """
    fields = dict(data)
    fields["decoder"] = decoder_config_from_dict(fields["decoder"])
    tower = fields.get("tower")
    if tower is not None:
        parts = {n: ViTConfig(**tower[n]) for n in ("first", "second") if n in tower}  # mixture
        plain: dict[str, Any] = {
            n: tuple(v) if isinstance(v, list) else v for n, v in tower.items()
        }
        fields["tower"] = TOWERS[tower["kind"]](**{**plain, **parts})
    if fields.get("connector") is not None:
        fields["connector"] = ConnectorConfig(**fields["connector"])
    if fields.get("head") is not None:
        head = fields["head"]
        fields["head"] = HeadConfig(**{**head, "layers": tuple(head["layers"])})
    if fields.get("text_tower") is not None:
        text = fields["text_tower"]
        fields["text_tower"] = (BertConfig if "kind" not in text else ClipTextConfig)(**text)
    if "merge" in fields:
        fields["merge"] = ImageLayoutConfig(**fields["merge"])
    return VLMConfig(**fields)


def no_decoder(text: ClipTextConfig) -> DecoderConfig:
    """Return the decoder of no layers of a dual encoder: only the vocabulary and context of its
    text tower."""
    return DecoderConfig(
        vocab_size=text.vocab_size,
        width=text.width,
        num_layers=0,
        num_heads=1,
        num_kv_heads=1,
        head_dim=text.width,
        ffn_width=text.ffn_width,
        context_length=text.context_length,
        tied_head=False,
    )


def decoder_config_from_dict(data: dict[str, Any]) -> DecoderConfig:
    """Rebuild a `DecoderConfig` from JSON types (lists become tuples)."""
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
    }
    if fields.get("rope_scaling") is not None:
        scaling = dict(fields["rope_scaling"])
        scaling["factors"] = tuple(scaling.get("factors", ()))
        fields["rope_scaling"] = RopeScaling(**scaling)
    return DecoderConfig(**fields)
