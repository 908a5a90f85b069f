"""Checkpoints on the hub: `owner/name`, `owner/name@revision`, `owner/name:file.gguf`.

What the repository lists is looked at first; then settings, the tokenizer and one format of
weights are downloaded into the hub library's own cache, and nothing else: never code. Without a
network, or with HF_HUB_OFFLINE=1, what the cache holds is used.
"""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from visavis.checkpoints.gguf.reader import part_names
from visavis.errors import FetchError

HUB_ID = re.compile(
    r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+))?"
    r"(?::(?P<file>[\w.-]+(?:/[\w.-]+)*\.gguf))?",
    re.ASCII,
)
MAIN = ("visavis.json", "adapter_config.json", "config.json")  # what makes a folder a checkpoint
SETTINGS = (
    *MAIN,
    *("generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("video_preprocessor_config.json", "chat_template.jinja", "chat_template.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("modules.json", "sentence_bert_config.json"),  # sentence-transformers'
)
# Files of which the first that is there is enough.
WORDS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"), ("spiece.model",))
ADAPTER = (("adapter_model.safetensors",), ("adapter_model.bin",))
WEIGHTS = (
    ("model.safetensors",),
    ("model.safetensors.index.json", "model-*.safetensors"),
    ("pytorch_model.bin",),
    ("pytorch_model.bin.index.json", "pytorch_model-*.bin"),
    ("mm_projector.bin",),  # LLaVA's first stage
    ("*.safetensors",),  # ours
)
BESIDE = ("non_lora_trainables.bin",)  # LLaVA's adapters
# Below: TinyLLaVA's, sentence-transformers'.
FOLDERS = ("", "language_model/", "vision_tower/", "connector/", "1_Pooling/")
MAX_LISTED = 6


@dataclass(frozen=True)
class HubId:
    repository: str
    revision: str = "main"
    file: str = ""  # a .gguf file

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return self.repository + revision + (f":{self.file}" if self.file else "")


def parse(name: str) -> HubId | None:
    """Return the hub id that a text is, if it can be one.

    Example:
        "llava-hf/llava-1.5-7b-hf@main" -> HubId("llava-hf/llava-1.5-7b-hf", "main")
    """
    found = HUB_ID.fullmatch(name)
    if found is None or ".." in name or "--" in found["repository"]:
        return None
    return HubId(found["repository"], found["revision"] or "main", found["file"] or "")


def fetch(wanted: HubId, *, settings_only: bool = False) -> Path:
    """Return the folder or .gguf file that a hub id stands for, downloading what the cache lacks.

    Args:
        settings_only: download config.json and the other settings beside it, and no weights.

    Raises:
        FetchError: no such repository, revision or file; it is gated; or there is no network and
            the cache does not hold it.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        return _cached(wanted, "HF_HUB_OFFLINE is set, so nothing is downloaded")
    with _explained(wanted) as broken:
        info = HfApi().model_info(wanted.repository, revision=wanted.revision)
    if broken:
        return _cached(wanted, f"the hub cannot be reached ({broken[0]})")
    names = wanted_files([one.rfilename for one in info.siblings or []], wanted)
    if settings_only:
        names = [name for name in names if name in SETTINGS]
    with _explained(wanted) as broken, _progress():
        folder = snapshot_download(
            wanted.repository,
            revision=wanted.revision,
            allow_patterns=[re.sub(r"([*?[])", r"[\1]", name) for name in names],
        )
    if broken:
        raise FetchError(
            f"the download of {wanted} broke off ({broken[0]}); run it again to resume it."
        )
    return Path(folder, wanted.file)


def wanted_files(listed: list[str], wanted: HubId) -> list[str]:
    """Return the files of a repository that are needed, out of all it lists.

    Raises:
        FetchError: it holds nothing that can be loaded, or not the file that was asked for.
    """
    files = set(listed)
    if wanted.file:
        parts = part_names(wanted.file)
        missing = [part for part in parts if part not in files]
        if missing:
            raise FetchError(
                f"{wanted.repository} has no {missing[0]}, expected one of "
                f"{_listed(files, '*.gguf') or 'its .gguf files, of which it has none'}."
            )
        return parts
    if not files & set(MAIN):
        ggufs = _listed(files, "*.gguf")
        advice = f"name one of its files: {wanted.repository}:FILE ({ggufs})" if ggufs else ""
        raise FetchError(
            f"{wanted.repository} has none of {', '.join(MAIN)}, expected a checkpoint; "
            f"{advice or 'it may be a data set or hold files of another library'}."
        )
    found: list[str] = []
    for folder in FOLDERS:
        inside = {name.removeprefix(folder) for name in files if name.startswith(folder)}
        inside = {name for name in inside if "/" not in name}
        adapter = "adapter_config.json" in inside
        kinds = [[name] for name in (*SETTINGS, *(BESIDE if adapter else ()))]
        kinds += [_first(inside, WORDS), _first(inside, ADAPTER if adapter else WEIGHTS)]
        found += [folder + name for kind in kinds for name in kind if name in inside]
    return found


def _first(files: set[str], kinds: tuple[tuple[str, ...], ...]) -> list[str]:
    """Return the files of the first kind whose first name is there."""
    for kind in kinds:
        if fnmatch.filter(files, kind[0]):
            return [name for pattern in kind for name in sorted(fnmatch.filter(files, pattern))]
    return []


def _listed(files: set[str], pattern: str) -> str:
    names = sorted(fnmatch.filter(files, pattern))
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def cached(wanted: HubId) -> Path | None:
    """Return the folder or .gguf file of a hub id if the cache holds it; asks no network."""
    from huggingface_hub import try_to_load_from_cache

    for name in (wanted.file,) if wanted.file else MAIN:
        found = try_to_load_from_cache(wanted.repository, name, revision=wanted.revision)
        if isinstance(found, str):
            return Path(found) if wanted.file else Path(found).parent
    return None


def _cached(wanted: HubId, reason: str) -> Path:
    """Return the folder or .gguf file of a hub id from the cache.

    Raises:
        FetchError: it holds nothing of this revision.
    """
    if (found := cached(wanted)) is not None:
        return found
    raise FetchError(
        f"{wanted} is no file or folder here, and as a name on the hub it is not in the cache: "
        f"{reason}. Check the path, or fetch it once with a network."
    )


@contextmanager
def _explained(wanted: HubId) -> Iterator[list[str]]:
    """Turn the hub's refusals into one `FetchError`; all else is noted in what it yields."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    broken: list[str] = []
    try:
        yield broken
    except GatedRepoError as error:
        raise FetchError(
            f"{wanted.repository} is gated: its owner asks you to accept terms first. Do so on its "
            "page, then log in with `hf auth login` or set HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise FetchError(
            f"{wanted} is no file or folder here, and the hub has no {wanted.repository!r} that "
            "may be read; check the spelling, or log in with `hf auth login` if it is private."
        ) from error
    except RevisionNotFoundError as error:
        raise FetchError(
            f"{wanted.repository} has no revision {wanted.revision!r}; give a branch, a tag or a "
            "whole commit hash after the @, or nothing."
        ) from error
    except Exception as error:  # the library's clients raise their own kinds, by version
        broken.append(next(iter(str(error).splitlines()), "") or type(error).__name__)


@contextmanager
def _progress() -> Iterator[None]:
    """Show the library's progress bars to people only."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    hide = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()
