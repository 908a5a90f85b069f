"""A model built while its checkpoint is read, its decoder's matrices packed one after another.

What is packed, and in how many bits, is decided here, from `precision`:

    auto          what is stored in integers stays so; floating-point weights stay as they are
    int8, int4    floating-point weights become integers too, of at most this many bits
    f32 bf16 f16  nothing is packed

Embeddings and head keep 8 bits under int4: they are the two matrices whose every row stands for a
token, and the head's error goes to the scores at once. A model of at most `MAX_DENSE_WEIGHTS` keeps
a floating-point copy beside the integers, which makes reading prompts faster; of a larger one only
the integers are held, and while it is read one matrix more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from visavis.checkpoints.checkpoint import INTEGERS, auto_dtype, blank, build
from visavis.checkpoints.tensor_files import check_values
from visavis.errors import InputError
from visavis.memory import give_back
from visavis.model.config import VLMConfig
from visavis.model.decoder import Decoder
from visavis.model.layers import Embedding, Linear
from visavis.model.native_decoder import NativeDecoder, can_run
from visavis.model.native_rows import OWN, NativeRows
from visavis.model.quantized_linear import (
    GROUP,
    ROWS,
    Groups,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedRows,
    Rows,
    fill_rows,
    has_kernel,
    quantize,
)
from visavis.model.vlm import VLM
from visavis.native.library import native

MAX_DENSE_WEIGHTS = 1 << 28  # 512 MB in bfloat16
CHUNK = 1 << 19  # weights that are made integers at a time, by each of the threads
THREADS = 2
MOST_BITS = 8
EMBED, HEAD = "decoder.embed.weight", "decoder.head.weight"

LowRank = Mapping[str, tuple[Tensor, Tensor]]


class WeightPart(NamedTuple):
    """Some rows of a matrix, to be packed alike.

    Attributes:
        cut: the first row and the one past the last -> these rows.
        kind, blocks: a GGUF type that the rows are stored in, and as `cut` their blocks, several
            arrays of uint8 [n, bytes] below one another.
    """

    num_rows: int
    bits: int
    group: int
    cut: Callable[[int, int], Groups]
    kind: str = ""
    blocks: Callable[[int, int], Iterator[np.ndarray]] | None = None


class Quantizer:
    """Takes a checkpoint's tensors one by one, then gives the model.

    A packed matrix is a tensor without numbers ("meta") in the state from which the model is built;
    its rows wait in `rows`.
    """

    def __init__(self, config: VLMConfig, precision: str, device: str, *, where: str) -> None:
        """
        Args:
            where: the file or folder, for messages.

        Raises:
            InputError: integers on a device, or with a PyTorch, that has no product for them.
        """
        self.config, self.device, self.where = config, device, where
        self.dtype = auto_dtype(precision, device)
        self.bits = INTEGERS.get(precision)
        if self.bits and device != "cpu":
            raise InputError(
                f"precision {precision!r} on {device}, expected cpu: packed weights have no "
                "product elsewhere yet. Use precision='bf16', or device='cpu'."
            )
        if self.bits and not config.has_decoder:
            raise InputError(
                f"precision {precision!r} makes integers of a language model's matrices, and "
                f"{where} has none: it only embeds. Use precision='bf16' or 'f32'."
            )
        kernels = native() if device == "cpu" else None
        if kernels is not None:
            fast = kernels.vv_level() != b"portable"
        else:  # elsewhere PyTorch's packed product is a hundred times slower than the dense one
            fast = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and has_kernel()
        if self.bits and kernels is None and not has_kernel():
            raise InputError(
                f"precision {precision!r} needs the compiled kernels, which are missing or turned "
                f"off, or PyTorch's int4 kernel, which PyTorch {torch.__version__} lacks. Run "
                "`visavis doctor`, or use precision='bf16' or 'f32'."
            )
        self.packs = bool(self.bits) or (precision == "auto" and device == "cpu" and fast)
        self.native = self.packs and kernels is not None
        self.rows: dict[str, list[Rows]] = {}
        self.threads = ThreadPoolExecutor(max_workers=THREADS)
        self.expected = blank(config, self.dtype).state_dict()
        matrices = {
            name: tensor.numel()
            for name, tensor in self.expected.items()
            if name.startswith("decoder.") and tensor.dim() == 2
        }
        if config.decoder.tied_head:
            del matrices[HEAD]
        small = sum(matrices.values()) <= MAX_DENSE_WEIGHTS
        self.keeps_dense = small and not self.native
        if self.keeps_dense and matrices and not config.decoder.tied_head:
            del matrices[EMBED]  # no product reads it
        self.matrices = set(matrices)

    @property
    def regime(self) -> str:
        """The settings that computed vectors depend on: dtype, packing and native products."""
        packed = self.packs and not self.keeps_dense
        return f"{self.dtype}{', packed' if packed else ''}{', native' if self.native else ''}"

    def bits_of(self, name: str, shape: tuple[int, ...], stored: int | None = None) -> int | None:
        """Return the bits that a tensor of ours is to be packed in; None: it is not.

        Args:
            stored: the bits it has; None: it is floating-point.
        """
        if not self.packs or name not in self.matrices or shape[-1] % GROUP:
            return None
        if shape != self.expected[name].shape:
            return None  # `build` says so
        wanted = MOST_BITS if self.bits and name in (EMBED, HEAD) else self.bits
        return min(stored, wanted or MOST_BITS) if stored else wanted

    def take(self, name: str, tensor: Tensor) -> Tensor:
        """Return the state entry for a floating-point tensor.

        Raises:
            CheckpointError: it holds values that are not numbers.
        """
        check_values(name, tensor, self.where)
        bits = self.bits_of(name, tuple(tensor.shape))
        if bits is None:
            return self.cast(name, tensor)

        def cut(start: int, end: int) -> Groups:
            return quantize(tensor[start:end], bits)

        return self.pack(name, tensor.shape[1], [WeightPart(len(tensor), bits, GROUP, cut)])

    def cast(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor in the type that the model has it in."""
        return tensor.to(self.expected[name].dtype) if name in self.expected else tensor

    def pack(self, name: str, in_features: int, parts: Iterable[WeightPart]) -> Tensor:
        """Pack a matrix, given as parts stacked by rows, and return its state entry."""
        found = self.rows[name] = []
        step = max(1, CHUNK // (ROWS * in_features)) * ROWS
        for part in parts:
            rows = self._empty(part, in_features)
            found.append(rows)

            def fill(start: int, part: WeightPart = part, rows: Rows = rows) -> None:
                end = min(start + step, part.num_rows)
                if part.blocks is None or not isinstance(rows, NativeRows):
                    fill_rows(rows, start, part.cut(start, end))
                    return
                for blocks in part.blocks(start, end):
                    at, stride = blocks.ctypes.data, blocks.strides[0]
                    rows.fill(start, at, stride, len(blocks))
                    start += len(blocks)

            list(self.threads.map(fill, range(0, part.num_rows, step)))
        return torch.empty(sum(p.num_rows for p in found), in_features, device="meta")

    def _empty(self, part: WeightPart, in_features: int) -> Rows:
        if not self.native:
            return QuantizedRows(part.num_rows, in_features, part.bits, part.group)
        return NativeRows(part.num_rows, in_features, part.kind or OWN[part.bits])

    def build(self, state: dict[str, Tensor], low_rank: LowRank | None = None) -> VLM:
        """Return the model.

        Args:
            low_rank: by a linear's name, a pair [r, in], [out, r] that is merged into the state's
                tensor, but not into packed rows.

        Raises:
            CheckpointError: tensors are missing, unexpected or of another shape.
        """
        vlm = build(self.config, state, self.dtype, self.device, where=self.where)
        for name, rows in self.rows.items():
            path = name.removeprefix("decoder.").removesuffix(".weight")
            self._put(vlm.decoder, path, rows, (low_rank or {}).get(f"decoder.{path}"))
        self.threads.shutdown()
        if self.native and self.config.has_decoder and can_run(vlm.decoder):
            vlm.decoder.compiled = NativeDecoder(vlm.decoder)
        if self.rows and not self.keeps_dense:
            give_back()  # what was needed on the way, 30 MB or more
        return vlm

    def _put(
        self,
        decoder: Decoder,
        path: str,
        rows: list[Rows],
        low_rank: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Put packed rows in the place of a linear, or of the embeddings and the head they are."""
        if path == "embed":
            if not self.keeps_dense:
                decoder.embed = QuantizedEmbedding(rows, dtype=self.dtype)
            if not decoder.config.tied_head:
                return
            path = "head"
        linear = decoder.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        packed = QuantizedLinear(
            rows,
            dtype=self.dtype,
            result=torch.float32 if path == "head" else None,
            bias=linear.bias,
            low_rank=low_rank,
        )
        if self.keeps_dense:
            packed.dense = packed.weight if linear.weight.is_meta else linear.weight.detach()
            if path == "head" and decoder.config.tied_head:
                assert isinstance(decoder.embed, nn.Embedding)
                decoder.embed.weight = nn.Parameter(packed.dense, requires_grad=False)
        owner, _, attribute = path.rpartition(".")
        setattr(decoder.get_submodule(owner), attribute, packed)


def unpack_linears(decoder: Decoder) -> None:
    """Replace packed linears by plain ones, which can be trained and adapted."""
    decoder.compiled = None
    for path, module in list(decoder.named_modules()):
        if not isinstance(module, QuantizedLinear):
            continue
        weight = nn.Parameter(module.weight, requires_grad=False)
        rows, columns = weight.shape
        plain: Linear | Embedding
        if isinstance(module, QuantizedEmbedding):
            plain = Embedding(rows, columns, device="meta")
        else:
            plain = Linear(columns, rows, bias=module.bias is not None, device="meta")
            if module.bias is not None:
                plain.bias = nn.Parameter(module.bias, requires_grad=False)
        plain.weight = weight
        decoder.set_submodule(path, plain)
    if decoder.config.tied_head:
        decoder.head.weight = decoder.embed.weight
