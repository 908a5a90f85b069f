"""Inputs of a model: text, images, videos, documents, and conversations of them.

`Prompt.of` and `Prompt.chat` turn every accepted input (str, path, PIL image, numpy array, dict,
OpenAI content or messages) into a `Prompt`. No file is opened here.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from visavis.errors import InputError
from visavis.utils import shortened, type_name

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image as PILImage

Role: TypeAlias = Literal["system", "user", "assistant"]
ROLES: tuple[str, ...] = get_args(Role)
ITEM_TYPES = (
    "str, pathlib.Path, PIL image, numpy array, dict(text=, image=, video=, document=), OpenAI "
    "content list, OpenAI messages, visavis Text, Image, Video, Document, Message or Prompt"
)
IMAGE_TYPES = "a path, a data: URI, PIL image, numpy array, bytes or visavis.Image"
VIDEO_TYPES = "a path, a data: URI, bytes or a list of pictures in order"
DOCUMENT_TYPES = "a path or data: URI of a PDF, or its bytes"
# Suffixes of videos; ".ts" and ".ogg" are more often TypeScript and music.
_VIDEO_SUFFIXES = (
    ".mp4 .m4v .mov .qt .3gp .3g2 .3gpp .mj2 .mkv .mk3d .webm .avi .divx .mts .m2ts .m2t .mpg "
    ".mpeg .mpe .m1v .m2v .vob .flv .f4v .ogv .ogm .ogx .asf .wmv .h264 .264 .avc .h265 .265 "
    ".hevc .ivf .obu .nut .mxf"
)
VIDEO_SUFFIXES = frozenset(_VIDEO_SUFFIXES.split())
DOCUMENT_SUFFIXES = frozenset((".pdf",))
MAX_DATA_URI_BYTES = 64 * 2**20  # decoded size of one picture, video or document in a message
_OPENAI_TYPES = "'text', 'image_url', 'video_url', 'video' or 'file'"
_URL_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+)://")  # 2+ letters: "C:/x.png" is a path


@dataclass(frozen=True)
class Text:
    """A piece of text."""

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise InputError(f"text is {type_name(self.text)}, expected str")
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            code = ord(self.text[error.start])
            raise InputError(
                f"text holds half a character (lone surrogate U+{code:04X} at {error.start}), "
                "which no tokenizer can read; it was probably cut or decoded wrongly: decode the "
                "bytes again as UTF-8 with errors='replace'"
            ) from None


@dataclass(frozen=True)
class Page:
    """One page of a PDF, not yet rendered: what the `Image`s of a `Document` hold."""

    document: Path | bytes
    number: int  # from 1


@dataclass(frozen=True)
class Stored:
    """A file inside another one (a tar, a table), read whenever its bytes are needed."""

    name: str  # for messages; no two have the same
    read: Callable[[], bytes] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Content:
    """The content of an image or video when it was read, see `processing.images.ContentHasher`."""

    hash: str  # 32 hex digits, equal for equal content
    size: tuple[int, int] | None = None  # of an upright image; None: not known from its header
    stamp: tuple[tuple[int, int, int], ...] = ()  # size, modification time, inode of each file


@dataclass(frozen=True, eq=False)
class Image:
    """An image, not yet read. A `str` is taken as a file path or a `data:` URI and replaced by
    the `Path` or the bytes it stands for. Two are equal if they name the same file or page, hold
    the same bytes, or hold the same image object. `content` is set where it was read before."""

    source: Path | PILImage | np.ndarray | bytes | str | Page | Stored
    content: Content | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        source = self.source
        if isinstance(source, str):
            object.__setattr__(self, "source", _path_or_bytes(source, "image", IMAGE_TYPES))
        elif not isinstance(source, (Path, bytes, Page, Stored)) and not _is_pixels(source):
            raise InputError(
                f"image is {type_name(source)}, expected {IMAGE_TYPES}{_array_hint(source)}"
            )

    def _key(self) -> Path | bytes | Page | Stored | int:
        source = self.source
        return source if isinstance(source, (Path, bytes, Page, Stored)) else id(source)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Image) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


@dataclass(frozen=True)
class Video:
    """A video, not yet read: a file, its bytes, a folder of frames, or the frames as images.
    A `str` is taken as a path or a `data:` URI. `frames` asks for another number of frames than
    the model's own. `content` is set where it was read before."""

    source: Path | bytes | str | tuple[Image, ...]
    frames: int | None = None
    content: Content | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        source = self.source
        if isinstance(source, str):
            object.__setattr__(self, "source", _path_or_bytes(source, "video", VIDEO_TYPES))
        elif isinstance(source, (list, tuple)):
            if not source:
                raise InputError("video is an empty list, expected its frames as pictures")
            object.__setattr__(self, "source", tuple(map(_image, source)))
        elif not isinstance(source, (Path, bytes)):
            raise InputError(f"video is {type_name(source)}, expected {VIDEO_TYPES}")
        if self.frames is not None:
            _check_count("frames of a video", self.frames)


@dataclass(frozen=True)
class Document:
    """A PDF, not yet read; a model reads its pages as images (`processing/pdf.py`). A
    `str` is taken as a path or a `data:` URI. `pages` counts from 1; None means all of them."""

    source: Path | bytes | str
    pages: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        source = self.source
        if isinstance(source, str):
            object.__setattr__(self, "source", _path_or_bytes(source, "document", DOCUMENT_TYPES))
        elif not isinstance(source, (Path, bytes)):
            raise InputError(f"document is {type_name(source)}, expected {DOCUMENT_TYPES}")
        if self.pages is not None:
            if not isinstance(self.pages, (list, tuple, range)) or not self.pages:
                raise InputError(f"pages are {self.pages!r}, expected numbers from 1, as (1, 3)")
            for number in self.pages:
                _check_count("page number", number)
            object.__setattr__(self, "pages", tuple(self.pages))


Visual: TypeAlias = Image | Video | Document
Part: TypeAlias = Text | Visual
_VISUALS = (Image, Video, Document)


@dataclass(frozen=True)
class Message:
    """One turn. `parts` keep their order; a plain str stands for one Text."""

    role: Role
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise InputError(f"message role is {self.role!r}, expected one of {', '.join(ROLES)}")
        parts: Any = self.parts  # as passed, checked here
        if isinstance(parts, (str, Text, *_VISUALS)):
            parts = (parts,)
        expected = "Text, Image, Video or Document"
        if not isinstance(parts, Sequence) or isinstance(parts, bytes):
            raise InputError(
                f"message parts are {type_name(parts)}, expected a tuple of {expected}"
            )
        parts = tuple(Text(part) if isinstance(part, str) else part for part in parts)
        for part in parts:
            if not isinstance(part, (Text, *_VISUALS)):
                raise InputError(f"message part is {type_name(part)}, expected {expected}")
        object.__setattr__(self, "parts", parts)


@dataclass(frozen=True)
class Prompt:
    """The turns a model is given. Every user turn holds some text or something to look at."""

    messages: tuple[Message, ...]

    def __post_init__(self) -> None:
        messages: Any = self.messages  # as passed, checked here
        if isinstance(messages, Message):
            messages = (messages,)
        if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
            raise InputError(
                f"messages are {type_name(messages)}, expected a tuple of Message; "
                "Prompt.of(item) accepts everything else"
            )
        for message in messages:
            if not isinstance(message, Message):
                raise InputError(f"messages hold {type_name(message)}, expected Message")
            is_empty = all(isinstance(p, Text) and not p.text.strip() for p in message.parts)
            if message.role == "user" and is_empty:
                raise InputError(
                    "empty text and no image, video or document: a user message needs one; "
                    "an empty line or field in your data is the likely cause"
                )
        if all(message.role == "system" for message in messages):
            raise InputError(
                f"a prompt of {len(messages)} messages, none from a user or the assistant: "
                "there is nothing to answer or embed"
            )
        object.__setattr__(self, "messages", tuple(messages))

    @property
    def visuals(self) -> tuple[Image | Video, ...]:
        """Every image and video, in order; documents only as the images `pdf.expand` makes."""
        return tuple(p for m in self.messages for p in m.parts if isinstance(p, (Image, Video)))

    @property
    def text(self) -> str:
        """Every piece of text, in order, joined by newlines: for previews, not for a model."""
        return "\n".join(p.text for m in self.messages for p in m.parts if isinstance(p, Text))

    def content_key(self, hash_of: Callable[[Visual], str], *, instruction: str = "") -> str:
        """Return 32 hex digits, equal for two prompts exactly if their content is: the same roles
        and, in the same order, the same texts and media. Index, mining, training and data checks
        identify items by it.

        Args:
            hash_of: content hash of an image, video or document, such as `images.content_hash`.
            instruction: what the item is embedded for, if its vector depends on it.
        """
        pieces = [("instruction", instruction)] if instruction else []
        for message in self.messages:
            pieces.append(("role", message.role))
            for part in message.parts:
                value = part.text if isinstance(part, Text) else hash_of(part)
                pieces.append((type(part).__name__, value))
        return hashlib.blake2b(json.dumps(pieces).encode(), digest_size=16).hexdigest()

    @classmethod
    def of(cls, item: Any) -> Prompt:
        """Return the prompt of `item`. A plain str is text; a Path is an image, or by its suffix a
        video or document (an animated GIF is an image, unless it is given as a video).

        Example::

            "a cat"                                  ->  user: Text
            Path("cat.jpg"), Path("a.mp4")           ->  user: Image; user: Video
            {"image": "cat.jpg", "text": "who?"}     ->  user: Image, Text (in the dict's order)
            {"video": "a.mp4"}, {"document": "a.pdf"}  ->  user: Video; user: Document
            [{"type": "text", "text": "who?"}, {"type": "image_url", "image_url": {"url": "…"}}]
            [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}, …]

        Raises:
            InputError: the item is of another type, is empty, or names something remote.
        """
        if isinstance(item, Prompt):
            return item
        if isinstance(item, Message):
            return cls((item,))
        if isinstance(item, (str, Text)):
            return cls((Message("user", (item if isinstance(item, Text) else Text(item),)),))
        if isinstance(item, (Path, *_VISUALS)) or _is_pixels(item):
            return cls((Message("user", (_visual(item),)),))
        if isinstance(item, Mapping):
            if "role" in item:
                return cls((_openai_message(item),))
            parts = (_openai_part(item),) if "type" in item else _dict_parts(item)
            return cls((Message("user", parts),))
        if isinstance(item, (list, tuple)):
            return cls._of_list(item)
        hint = "; wrap a picture's bytes in visavis.Image" if isinstance(item, bytes) else ""
        raise InputError(
            f"item is {type_name(item)}, expected {ITEM_TYPES}{hint}{_array_hint(item)}"
        )

    @classmethod
    def _of_list(cls, items: Sequence[Any]) -> Prompt:
        if not items:
            raise InputError("item is an empty list, expected OpenAI content or messages")
        if all(isinstance(i, Message) or (isinstance(i, Mapping) and "role" in i) for i in items):
            return cls(tuple(map(_message, items)))
        return cls((Message("user", tuple(map(_openai_part, items))),))

    @classmethod
    def chat(
        cls,
        text: str,
        images: Iterable[Any] = (),
        history: Iterable[Message | Mapping[str, Any]] = (),
    ) -> Prompt:
        """Return earlier turns plus one user turn: the images, then the text.

        Args:
            text: the question; may be empty when there is an image.
            images: paths (str or Path), data: URIs, PIL images, arrays, bytes; a
                single one need not be in a list. Videos and documents may stand among them: paths
                by their suffix, or `Video` and `Document`.
            history: earlier turns, as `Message` or OpenAI-style dicts.
        """
        if isinstance(history, (str, bytes, Mapping, Message)):
            raise InputError(
                f"history is {type_name(history)}, expected a list of Message or OpenAI messages"
            )
        last = Message("user", (*map(_visual, _as_items(images)), Text(text)))
        return cls((*map(_message, history), last))


def _dict_parts(item: Mapping[str, Any]) -> tuple[Part, ...]:
    """Parts of dict(text=, image=, video=, document=), in the order of its keys; None means
    absent. A list of images is several, a list given as a video is its frames."""
    kinds: dict[str, Callable[[Any], list[Part]]] = {
        "text": lambda value: [Text(value)],
        "image": lambda value: [_image(part) for part in _as_items(value)],
        "video": lambda value: [value if isinstance(value, Video) else Video(value)],
        "document": lambda value: [value if isinstance(value, Document) else Document(value)],
    }
    unknown = [key for key in item if key not in kinds]
    if unknown:
        raise InputError(
            f"item has the keys {', '.join(map(repr, item))}, expected 'text', 'image' (one "
            "picture or a list), 'video' and 'document', or OpenAI's 'role' or 'type'; rename or "
            f"remove {unknown[0]!r}"
        )
    return tuple(
        part for key, value in item.items() if value is not None for part in kinds[key](value)
    )


def _visual(value: Any) -> Visual:
    """Return an image, video or document; of a path, the kind that its suffix names."""
    if isinstance(value, _VISUALS):
        return value
    image = Image(value)
    suffix = image.source.suffix.lower() if isinstance(image.source, Path) else ""
    if suffix in VIDEO_SUFFIXES:
        return Video(image.source)  # type: ignore[arg-type]
    if suffix in DOCUMENT_SUFFIXES:
        return Document(image.source)  # type: ignore[arg-type]
    return image


def _as_items(value: Any) -> Iterable[Any]:
    """`value` as a list, if it is one image and not a list of images."""
    if isinstance(value, (str, bytes, Path, *_VISUALS)) or _is_pixels(value):
        return [value]
    if not isinstance(value, Iterable) or isinstance(value, Mapping):
        raise InputError(f"image is {type_name(value)}, expected {IMAGE_TYPES}, or a list of them")
    return value


def _image(source: Any) -> Image:
    return source if isinstance(source, Image) else Image(source)


def _message(item: Any) -> Message:
    if isinstance(item, Message):
        return item
    if isinstance(item, Mapping) and "role" in item:
        return _openai_message(item)
    raise InputError(
        f"message is {type_name(item)}, expected visavis.Message or a dict with 'role' and "
        "'content'"
    )


def _openai_message(item: Mapping[str, Any]) -> Message:
    content = item.get("content")
    if isinstance(content, str):
        return Message(item["role"], (Text(content),))
    if isinstance(content, (list, tuple)):
        return Message(item["role"], tuple(map(_openai_part, content)))
    raise InputError(
        f"content of the {item['role']} message is {type_name(content)}, expected a str or a "
        "list of content parts; tool calls are not supported"
    )


def _openai_part(part: Any) -> Part:
    """One entry of an OpenAI content list. `detail` of an image is accepted and has no effect."""
    if isinstance(part, (Text, *_VISUALS)):
        return part
    if not isinstance(part, Mapping) or "type" not in part:
        raise InputError(
            f"content part is {type_name(part)}, expected a dict with 'type': {_OPENAI_TYPES}; "
            "several items belong in separate calls or in a list given to embed()"
        )
    kind = part["type"]
    if kind == "text":
        return Text(part.get("text"))  # type: ignore[arg-type]  # Text names a wrong type
    if kind == "image_url":
        return Image(_sent(part, kind, "url", "image/png"))
    if kind == "video" and isinstance(part.get(kind), (list, tuple)):  # Qwen's form: its frames
        return Video(tuple(Image(_sent({kind: url}, kind, "", "image/png")) for url in part[kind]))
    if kind in ("video_url", "video"):
        return Video(_sent(part, kind, "url", "video/mp4"))
    if kind == "file":
        return Document(_sent(part, kind, "file_data", "application/pdf"))
    raise InputError(f"content part type is {kind!r}, expected {_OPENAI_TYPES}")


def _sent(part: Mapping[str, Any], kind: str, key: str, media_type: str) -> str:
    """The data: URI in a part of a message, which may come from afar: no local files."""
    url = part.get(kind)
    url = url.get(key) if isinstance(url, Mapping) else url
    if not isinstance(url, str):
        raise InputError(f"{kind} is {type_name(url)}, expected a data: URI")
    name = {"image_url": "image", "file": "document"}.get(kind, "video")
    _refuse_remote(url, name, "a data: URI")
    if not url.lower().startswith("data:"):
        raise InputError(
            f"{kind} is {shortened(url)!r}, expected a data: URI such as "
            f"data:{media_type};base64,…; for a file use "
            f"dict({name}=path) or visavis.{name.capitalize()}(path)"
        )
    return url


def _path_or_bytes(text: str, what: str, expected: str) -> Path | bytes:
    _refuse_remote(text, what, expected)
    if text.lower().startswith("data:"):
        return _decode_data_uri(text, "application/pdf" if what == "document" else f"{what}/")
    if not text.strip():
        raise InputError(f"{what} is an empty str, expected a file path or a data: URI")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # "~name" of nobody
        raise InputError(f"{what} path {shortened(text)!r} cannot be used: {error}") from None


def _refuse_remote(text: str, what: str, expected: str) -> None:
    scheme = _URL_SCHEME.match(text)
    if scheme:
        noun = "picture" if what == "image" else what
        raise InputError(
            f"{what} is the {scheme[1].lower()} URL {shortened(text)!r}, expected {expected}; "
            f"visavis opens no URLs: download the {noun} first and pass its path"
        )


def _decode_data_uri(uri: str, media: str) -> bytes:
    header, comma, payload = uri.partition(",")
    media_type, *parameters = header[len("data:") :].lower().split(";")
    expected = media + "<kind>" if media.endswith("/") else media
    if not comma or "base64" not in (parameter.strip() for parameter in parameters):
        raise InputError(
            f"data: URI starts {shortened(header)!r}, expected data:{expected};base64,<data>"
        )
    if media_type and not media_type.startswith(media):
        raise InputError(f"data: URI holds {shortened(media_type)!r}, expected {expected}")
    if len(payload) > MAX_DATA_URI_BYTES * 4 // 3 + 4:
        raise InputError(
            f"data: URI of about {len(payload) * 3 // 4 / 2**20:.0f} MiB, expected at most "
            f"{MAX_DATA_URI_BYTES // 2**20} MiB; make it smaller or pass it as a file"
        )
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(
            f"data: URI is not valid base64 ({error}); it was probably cut or contains line "
            "breaks: encode the file again with base64.b64encode"
        ) from None


def _check_count(what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{what}: {value!r}, expected an int of at least 1")


def _is_pixels(value: Any) -> bool:
    """True for a PIL image or numpy array; imports neither for values that cannot be one."""
    if value is None or isinstance(value, (str, bytes, bool, int, float, list, tuple, dict)):
        return False
    import numpy as np
    from PIL import Image as pil

    return isinstance(value, (pil.Image, np.ndarray))


def _array_hint(value: Any) -> str:
    if type(value).__name__ == "Tensor":
        return "; turn a tensor into an array of shape [H, W, 3] with .permute(1, 2, 0).numpy()"
    return ""
