"""Chat formats as jinja, for `tokenizer.chat_template`: what a GGUF file can say of them.

llama.cpp puts a mark where a picture stands and hands a template the text around it; what belongs
beside a picture (LLaVA's newline after each) is therefore written beside that mark. Knows no
tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from visavis.checkpoints.checkpoint import Checkpoint, checkpoint_fingerprint
from visavis.checkpoints.gguf.decoder import check_types, decoder_config, decoder_tensors
from visavis.checkpoints.gguf.mmproj import ARCHITECTURE, MmprojModel, half_state, read_half
from visavis.checkpoints.gguf.reader import GGUFFile, TensorInfo, open_gguf
from visavis.checkpoints.gguf.repack import take_blocks
from visavis.checkpoints.quantize import Quantizer
from visavis.errors import CheckpointError
from visavis.model.config import VLMConfig
from visavis.processing.chat_formats import CHAT_FORMATS, ChatFormat, Turn
from visavis.processing.prompt_encoder import PromptConfig
from visavis.processing.tokenizer import build_tokenizer, special_tokens
from visavis.utils import lookup

MARK_START, MARK_END = "<__media", "__>"  # what llama.cpp's marks begin and end with


def chat_template(profile: PromptConfig, bos: str) -> str:
    """Return a jinja chat template that writes a profile's turns; empty where there are none.

    Of the formats of `chat_formats.py` only `plain`, which leaves the user's words out, has none.

    Args:
        bos: what every conversation begins with.
    """
    if not profile.chat_template:
        return profile.jinja
    turns = lookup("chat template", profile.chat_template, CHAT_FORMATS)
    if any(turn.images_only for turn in turns.turns.values()):
        return ""
    image = (turns.image_start + profile.image_start, profile.image_end + turns.image_end)
    return _jinja(turns, bos, _content(*image))


def _jinja(template: ChatFormat, bos: str, content: str) -> str:
    """Return jinja that renders turns as `templates.encode_turns` does.

    Args:
        content: an expression, what a message says.
    """

    def around(turn: Turn, text: str) -> str:
        before, after = _quoted(turn.start + turn.gap), _quoted(turn.end + turn.after)
        return f"{{{{ {before} + {text} + {after} }}}}"

    pieces = [f"{{{{ {_quoted(bos + template.before)} }}}}"]
    if template.system:
        own = around(template.turns["system"], _quoted(template.system))
        absent = "not messages or messages[0]['role'] != 'system'"
        pieces.append(f"{{% if {absent} %}}{own}{{% endif %}}")
    pieces.append("{% set seen = namespace(user=false) %}{% for message in messages %}")
    word = "if"
    for role, turn in template.turns.items():
        body = around(turn, content)
        if role == "user" and template.first_user is not None:
            first = around(template.first_user, content)
            once = "{% set seen.user = true %}"
            body = f"{{% if seen.user %}}{body}{{% else %}}{first}{once}{{% endif %}}"
        pieces.append(f"{{% {word} message['role'] == '{role}' %}}{body}")
        word = "elif"
    generation = _quoted(template.turns["assistant"].start)
    pieces.append("{% else %}{{ raise_exception('no such role in this chat format') }}")
    pieces.append("{% endif %}{% endfor %}")
    pieces.append(f"{{% if add_generation_prompt %}}{{{{ {generation} }}}}{{% endif %}}")
    return "".join(pieces)


def _content(image_start: str, image_end: str) -> str:
    """Return the expression of a message's text, with what belongs beside its pictures."""
    text = "message['content']"
    if image_start:
        text += f" | replace({_quoted(MARK_START)}, {_quoted(image_start + MARK_START)})"
    if image_end:
        text += f" | replace({_quoted(MARK_END)}, {_quoted(MARK_END + image_end)})"
    return f"({text})"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


NAME = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)
MAX_MISSING_LISTED = 5


class SplitGGUF(GGUFFile):
    """Several open files as one: tensors stay in the file that holds them."""

    def __init__(self, parts: list[GGUFFile]) -> None:
        first = parts[0]
        metadata = {k: v for k, v in first.metadata.items() if not k.startswith("split.")}
        self.owner: dict[str, GGUFFile] = {}
        tensors: dict[str, TensorInfo] = {}
        for part in parts:
            for name, info in part.tensors.items():
                if name in tensors:
                    raise CheckpointError(
                        f"{name} stands in {self.owner[name].path.name} and in {part.path.name}, "
                        "expected once; parts of two models are mixed, fetch them again."
                    )
                tensors[name], self.owner[name] = info, part
        super().__init__(first.path, b"", metadata, tensors)

    def raw(self, name: str) -> np.ndarray:
        """Return a tensor's bytes, a read-only uint8 view of its mapped file."""
        return self.owner[name].raw(name)

    def release(self, name: str) -> None:
        self.owner[name].release(name)


def part_names(name: str) -> list[str]:
    """Return the names of all parts of a model from one of them; of a whole file, its own."""
    named = NAME.fullmatch(name)
    if named is None:
        return [name]
    return [f"{named[1]}-{n:05}-of-{named[3]}.gguf" for n in range(1, int(named[3]) + 1)]


def open_model(path: Path) -> tuple[GGUFFile, list[Path]]:
    """Open a GGUF file, with all other parts if it is one of several; return their paths too.

    Raises:
        CheckpointError: a file is damaged, or parts are missing or do not belong together.
    """
    file = open_gguf(path)
    count = file.metadata.get("split.count", 1)
    if isinstance(count, int) and count in (0, 1):
        return file, [path]
    named = NAME.fullmatch(path.name)
    if not isinstance(count, int) or named is None or int(named[3]) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts, expected a name that ends in "
            f"-00001-of-{count!s:0>5}.gguf, by which the others are found; give the parts their "
            "names back, or join them with `llama-gguf-split --merge`."
        )
    paths = [path.with_name(name) for name in part_names(path.name)]
    missing = [one.name for one in paths if not one.is_file()]
    if missing:
        more = (
            f" and {len(missing) - MAX_MISSING_LISTED} more"
            if len(missing) > MAX_MISSING_LISTED
            else ""
        )
        raise CheckpointError(
            f"{path.parent} lacks {', '.join(missing[:MAX_MISSING_LISTED])}{more} of {count} "
            "parts; fetch what is missing into the same folder."
        )
    parts = [open_gguf(one) for one in paths]
    for number, part in enumerate(parts):
        found = tuple(part.metadata.get(f"split.{key}") for key in ("no", "count"))
        if found != (number, count):
            raise CheckpointError(
                f"{part.path} says it is part {found[0]} of {found[1]}, expected {number} (from "
                f"0) of {count}; its name was changed or it belongs to another model."
            )
    whole = SplitGGUF(parts)
    total = parts[0].metadata.get("split.tensors.count", len(whole.tensors))
    if total != len(whole.tensors):
        raise CheckpointError(
            f"the {count} parts of {path} hold {len(whole.tensors)} tensors, expected {total}; "
            "parts of two models are mixed, fetch them again."
        )
    return whole, paths


PROFILE = "visavis.prompt_profile"  # ours: how to ask and to embed, word for word
POOLING = {"mean": 1, "last": 3}  # llama.cpp's numbers
PLACEHOLDER = "<image>"  # what vocabularies call it that have one
MAX_LISTED = 5


def load_gguf(
    path: Path,
    *,
    vision_tower: Path | None = None,
    precision: str = "auto",
    device: str = "cpu",
) -> Checkpoint:
    """Load a language model from a GGUF file (and the other parts of a split one), with its
    tokenizer and chat template, and its vision half.

    Args:
        path: a file, or a folder with one language model and at most one vision half.
        vision_tower: the file of the vision half (mmproj).

    Raises:
        CheckpointError: a file is damaged or of a variant that is not read, or files do not belong
            together.
    """
    if path.is_dir():
        path, found = find_parts(path)
        vision_tower = vision_tower or found
    file, paths = open_model(path)
    if str(file.metadata.get("general.architecture")) == ARCHITECTURE:
        raise CheckpointError(
            f"{path} is the vision half of a model (mmproj), expected its language model; give "
            f"that, and this file with it: visavis.load('model.gguf', vision_tower={str(path)!r})."
        )
    config = VLMConfig(decoder=decoder_config(file))
    half = vision = None
    if vision_tower is not None:
        vision, half = _open_half(vision_tower, config.decoder.width, path)
        paths = [*paths, vision_tower]
    specials = special_tokens(file.metadata)
    if half is not None:
        # Without a placeholder in the vocabulary any id will do: images are found by position.
        config = half.joined(config, specials.by_text.get(PLACEHOLDER, 0))
    check_types(file)
    tokenizer = build_tokenizer(file.metadata)
    packing = Quantizer(config, precision, device, where=str(path))
    state = {n: take_blocks(packing, file, n, stored) for n, stored in decoder_tensors(file)}
    if vision is not None and half is not None:
        for name, tensor in half_state(vision, half):
            state[name] = packing.take(name, tensor)
    return Checkpoint(
        name=str(file.metadata.get("general.name", path.stem)),
        vlm=packing.build(state),
        tokenizer=tokenizer,
        specials=specials,
        profile=_profile(file),
        processor=None if half is None else half.processor,
        fingerprint=checkpoint_fingerprint(paths, {"precision": packing.regime}),
        files=paths,
    )


def find_parts(folder: Path) -> tuple[Path, Path | None]:
    """Return the language model of a folder, and its vision half if there is one.

    Raises:
        CheckpointError: several that could be meant, or no language model.
    """
    models, halves = [], []
    for path in sorted(folder.glob("*.gguf")):
        metadata = open_gguf(path).metadata
        if str(metadata.get("general.architecture")) == ARCHITECTURE:
            halves.append(path)
        elif metadata.get("split.no", 0) == 0:
            models.append(path)
    if len(models) != 1 or len(halves) > 1:
        listed = ", ".join(path.name for path in (*models, *halves)[:MAX_LISTED]) or "none"
        raise CheckpointError(
            f"{folder} holds {len(models)} language models and {len(halves)} vision halves in GGUF "
            f"({listed}), expected one and at most one; name the files: "
            "visavis.load('model.gguf', vision_tower='mmproj.gguf')."
        )
    return models[0], halves[0] if halves else None


def _open_half(path: Path, width: int, model: Path) -> tuple[GGUFFile, MmprojModel]:
    file = open_gguf(path)
    architecture = str(file.metadata.get("general.architecture"))
    if architecture != ARCHITECTURE:
        raise CheckpointError(
            f"{path} has general.architecture {architecture!r}, expected {ARCHITECTURE!r}, the "
            "vision half of a model (mmproj); give the language model first and this file's "
            "partner as vision_tower."
        )
    half = read_half(file)
    if half.connector.out_width != width:
        raise CheckpointError(
            f"{path} gives image tokens of width {half.connector.out_width}, but {model} is "
            f"{width} wide; the two belong to different models."
        )
    return file, half


def _profile(file: GGUFFile) -> PromptConfig:
    """Return how to ask and to embed: as we wrote it, or what the file's own keys say."""
    metadata: Mapping[str, Any] = file.metadata
    own = metadata.get(PROFILE)
    if isinstance(own, str):
        try:
            return PromptConfig(**json.loads(own))
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{file.path}: {PROFILE} cannot be read ({error}); the file is damaged or from a "
                "newer visavis: upgrade it."
            ) from error
    number = metadata.get(f"{metadata['general.architecture']}.pooling_type")
    number = number if isinstance(number, int) else None
    jinja = str(metadata.get("tokenizer.chat_template", ""))
    return PromptConfig(jinja=jinja, pooling="mean" if number == POOLING["mean"] else "last")
