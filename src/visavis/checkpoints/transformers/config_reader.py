"""Look-ups in a parsed config.json whose errors name the setting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from visavis.errors import CheckpointError
from visavis.utils import suggest

Json = Mapping[str, Any]

MAX_COUNT = 2**27  # no dimension of a real model is larger; absurd ones stop here
MAX_NUMBER = 2**40
MAX_LAYERS = 1000  # a model is built layer by layer before any weight is seen

# Names in config.json and in ours.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}


def without_nulls(config: Json) -> dict[str, Any]:
    """Drop nulls: almost everywhere they stand for the default."""
    return {key: value for key, value in config.items() if value is not None}


def require(name: str, value: object, fits: bool, expected: str) -> None:
    """Refuse a setting that does not fit.

    Raises:
        CheckpointError: `fits` is false.
    """
    if not fits:
        raise CheckpointError(
            f"the checkpoint's config sets {name} to {value!r}, expected {expected}; this variant "
            "is not supported, use a checkpoint without it"
        )


def section(config: Json, name: str) -> dict[str, Any]:
    """Return an object within a config, empty if it is absent or null."""
    found = config.get(name) or {}
    require(name, found, isinstance(found, dict), "an object")
    return dict(found)


def count(config: Json, name: str) -> int:
    """Return a setting that is a number of something."""
    value = config.get(name)
    whole = isinstance(value, int) and not isinstance(value, bool) and 0 < value < MAX_COUNT
    require(name, value, whole, "a positive whole number")
    return int(config[name])


def num_layers(config: Json) -> int:
    """Return how many layers a config has."""
    found = count(config, "num_hidden_layers")
    require("num_hidden_layers", found, found <= MAX_LAYERS, f"at most {MAX_LAYERS}")
    return found


def number(config: Json, name: str) -> float:
    """Return a setting that is a positive number."""
    value: Any = config.get(name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    require(name, value, is_number and 0 < value < MAX_NUMBER, "a positive number")
    return float(config[name])


def activation(config: Json) -> Any:
    """Return our name of `hidden_act`."""
    name = config.get("hidden_act")
    known = isinstance(name, str) and name in ACTIVATIONS
    require("hidden_act", name, known, f"one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[config["hidden_act"]]


def vit_fields(config: Json) -> dict[str, Any]:
    """Return the fields of a `ViTConfig` that every tower of square images has."""
    require("num_channels", (n := config.get("num_channels", 3)), n == 3, "3")
    width, heads = count(config, "hidden_size"), count(config, "num_attention_heads")
    require("num_attention_heads", heads, width % heads == 0, f"a divisor of {width}")
    image_size, patch_size = count(config, "image_size"), count(config, "patch_size")
    require("patch_size", patch_size, patch_size <= image_size, "less than image_size")
    return {
        "image_size": image_size,
        "patch_size": patch_size,
        "width": width,
        "num_layers": num_layers(config),
        "num_heads": heads,
        "activation": activation(config),
        "norm_eps": number(config, "layer_norm_eps"),
    }


def unknown_type(kind: object, known: tuple[str, ...]) -> CheckpointError:
    """Return the error for a `model_type` that is not read."""
    return CheckpointError(
        f"config.json has model_type {kind!r}, which is not read here: {suggest(str(kind), known)}"
    )
