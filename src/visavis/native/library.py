"""The compiled library, loaded through ctypes: structures and functions of `csrc/api.h`.

`VISAVIS_NATIVE` in the environment chooses what is used:

    (unset), 1                     the fastest kernels that this processor runs
    0                              nothing: PyTorch's operations instead
    avx512, avx2, neon, portable   these kernels
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

from visavis.errors import InputError

VARIABLE = "VISAVIS_NATIVE"
INTERFACE = 3  # VV_INTERFACE
LEVELS = ("avx512", "avx2", "neon", "portable")
FILE_NAME = {"win32": "visavis_native.dll", "darwin": "libvisavis_native.dylib"}.get(
    sys.platform, "libvisavis_native.so"
)
# vv_format
FORMATS = {
    "F32": 0,
    "BF16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 4,
    "Q5_1": 5,
    "Q8_0": 6,
    "Q2_K": 7,
    "Q3_K": 8,
    "Q4_K": 9,
    "Q5_K": 10,
    "Q6_K": 11,
    "A8": 12,
}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "quick_gelu": 3, "relu": 4}
ERRORS = {
    1: "a matrix is in a format that the kernels do not know",
    2: "the sizes of matrices, vectors or heads do not belong together",
    3: "a cache has no room for more tokens",
    4: "there is no memory for intermediate results",
}


NOT_FINITE = 5


class Matrix(ctypes.Structure):
    """`vv_matrix`: rows as they lie in memory, or packed."""

    _fields_ = (
        ("data", c_void_p),
        ("rows", c_int64),
        ("cols", c_int64),
        ("format", c_int32),
        ("unused", c_int32),
    )


class Linear(ctypes.Structure):
    """`vv_linear`: matrices below one another, a bias, a low-rank pair."""

    _fields_ = (
        ("parts", POINTER(Matrix)),
        ("num_parts", c_int64),
        ("bias", c_void_p),
        ("low", POINTER(Matrix)),
        ("high", POINTER(Matrix)),
    )


class Norm(ctypes.Structure):
    """`vv_norm`: float32 weight and bias."""

    _fields_ = (("weight", c_void_p), ("bias", c_void_p))


class Layer(ctypes.Structure):
    """`vv_layer`."""

    _fields_ = (
        *((name, Norm) for name in ("attn_norm", "ffn_norm", "q_norm", "k_norm")),
        *((name, Linear) for name in ("qkv", "out", "up", "down")),
        *((name, c_int32) for name in ("heads", "kv_heads", "ffn_width", "unused")),
    )


class Model(ctypes.Structure):
    """`vv_model`."""

    _fields_ = (
        ("layers", POINTER(Layer)),
        ("norm", Norm),
        ("head", Linear),
        *((name, c_int64) for name in ("num_layers", "width", "head_dim", "rotary_dim", "window")),
        *((name, c_int32) for name in ("layer_norm", "gated", "activation", "cache_format")),
        ("eps", c_float),
    )


class Sequence(ctypes.Structure):
    """`vv_sequence`: tokens of one sequence, and where its keys and values are."""

    _fields_ = (
        ("count", c_int64),
        ("past", c_int64),
        ("capacity", c_int64),
        ("keys", POINTER(c_void_p)),
        ("values", POINTER(c_void_p)),
    )


class NativeError(RuntimeError):
    """The kernels refused what they were given: a fault of the package."""


def library_path() -> Path:
    """Return where the compiled library is, or would be."""
    return Path(__file__).parent / FILE_NAME


def load(path: Path) -> ctypes.CDLL:
    """Return a compiled library with its functions declared.

    Raises:
        OSError: it is missing, or not for this system.
    """
    library = ctypes.CDLL(str(path))
    many = (c_void_p, c_int64, c_void_p, c_int32)
    for name, result, arguments in (
        ("vv_interface", c_int, ()),
        ("vv_set_level", c_int, (c_char_p,)),
        ("vv_level", c_char_p, ()),
        ("vv_packed_bytes", c_int64, (c_int32, c_int64, c_int64)),
        ("vv_stored_bytes", c_int64, (c_int32, c_int64)),
        (
            "vv_pack",
            c_int,
            (c_int32, c_int64, c_void_p, c_int64, c_int64, c_int64, c_void_p),
        ),
        (
            "vv_unpack",
            c_int,
            (POINTER(Matrix), c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_void_p),
        ),
        ("vv_product", c_int, (POINTER(Linear), *many)),
        ("vv_scan", c_int, (c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p)),
        (
            "vv_forward",
            c_int,
            (POINTER(Model), POINTER(Sequence), c_int64, *(c_void_p,) * 5, *many),
        ),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@cache
def find() -> tuple[ctypes.CDLL | None, str]:
    """Return the compiled library, or None and why there is none.

    Raises:
        InputError: VISAVIS_NATIVE names no kernels, or ones that this processor does not run.
    """
    wanted = os.environ.get(VARIABLE, "1").strip().lower()
    if wanted == "0":
        return None, f"switched off by {VARIABLE}=0"
    if wanted not in ("", "1", *LEVELS):
        raise InputError(
            f"{VARIABLE}={wanted!r}, expected 0, 1 or one of {', '.join(LEVELS)}; unset it to use "
            "the fastest kernels of this processor."
        )
    path = library_path()
    if not path.is_file():
        return None, "not compiled: no C++ compiler was found when visavis was installed"
    try:
        library = load(path)
    except (OSError, AttributeError) as error:
        return None, f"{path.name} cannot be loaded ({error})"
    if library.vv_interface() != INTERFACE:
        return None, f"{path.name} was compiled from another version of visavis"
    if wanted in LEVELS and library.vv_set_level(wanted.encode()):
        raise InputError(
            f"{VARIABLE}={wanted!r}, but this processor does not run these kernels; it runs "
            f"{library.vv_level().decode()}. Unset the variable."
        )
    return library, ""


def native() -> ctypes.CDLL | None:
    """Return the compiled library; None where it is missing or switched off.

    Raises:
        InputError: see `find`.
    """
    return find()[0]


def check(error: int) -> None:
    """Raise what an error code of the library means.

    Raises:
        MemoryError: it found no memory.
        NativeError: it refused its arguments.
    """
    if error == 4:
        raise MemoryError(ERRORS[error])
    if error:
        raise NativeError(ERRORS.get(error, f"error {error}"))
