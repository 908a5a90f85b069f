"""Text to video and video to text on MSR-VTT and MSVD, by CLIP4Clip's protocol.

    MSR-VTT 1k-A   MSRVTT_JSFUSION_test.csv (video_id, sentence), videos <id>.mp4 or .webm
    MSVD           test_list.txt, raw-captions.pkl, videos anywhere below the folder

A video may also be a folder of its frames. With one caption a video, ranks are those on the
diagonal of the similarity matrix; with several, each caption is ranked among all videos, and a
video among the videos' sets of captions by the best of each set.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from visavis.errors import InputError
from visavis.evaluate.items import VISUAL, Item, MissingFilesError, Problem, data_fingerprint
from visavis.evaluate.metrics import (
    Relevant,
    clip4clip_ranks,
    interval,
    rank,
    recall_summary,
)
from visavis.evaluate.readers.mmeb_video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, frames_of
from visavis.evaluate.results import TaskResult
from visavis.evaluate.scoring import dot
from visavis.evaluate.suite import Task
from visavis.evaluate.tables import find_first, iterate_rows
from visavis.evaluate.vectors import ALONE, Workers, embed_all
from visavis.inputs import Video

if TYPE_CHECKING:
    from visavis.api import Model

MAX_PICKLE_BYTES = 256 << 20
ALL_FRAMES = 32


@dataclass
class VideoData:
    """Captions and videos.

    Args:
        owner: of each caption the number of its video.
    """

    captions: list[Item] = field(default_factory=list)
    videos: list[Item] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    sources: list[Path] = field(default_factory=list)


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, texts and numbers; a pickle that names anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise InputError(
            f"the pickle of captions names {module}.{name}, expected lists of words only; it is "
            "not the official file"
        )


def read(task: Task, root: Path, *, frames: int | None = None) -> VideoData:
    """Return the captions and videos of a task.

    Args:
        frames: of each video; None: the model's own number of videos in files, and of folders of
            frames at most 32, as LLaVE takes.

    Raises:
        MissingFilesError: the captions are not there.
        InputError: they are damaged.
    """
    files, captions = _captions(task, root)
    data = VideoData(sources=files)
    found = _index(root, task.get("videos", [""]))
    query, target = task.get("query"), task.get("target")
    for name, texts in captions.items():
        path = found.get(name)
        if path is None:
            data.problems.append(Problem(f"video {name}", "is missing; unpack the videos"))
            continue
        try:
            video = frames_of(path, frames or ALL_FRAMES) if path.is_dir() else Video(path, frames)
        except InputError as error:
            data.problems.append(Problem(f"video {name}", str(error)))
            continue
        data.owner += [len(data.videos)] * len(texts)
        data.videos.append(Item("", (video,), target, f"{VISUAL}\n{target}"))
        data.names.append(name)
        data.captions += [Item(text, (), query, f"{query} {text}") for text in texts]
    return data


def _captions(task: Task, root: Path) -> tuple[list[Path], dict[str, list[str]]]:
    files = {name: find_first(root, patterns) for name, patterns in task.get("files").items()}
    missing = [task.get("files")[name][0] for name, found in files.items() if not found]
    if missing:
        raise MissingFilesError(f"{missing[0]} is missing below {root}; see --check for commands")
    captions: dict[str, list[str]] = {}
    if "table" in files:
        for row in iterate_rows(files["table"][:1]):
            if not row.get("video_id") or not row.get("sentence"):
                raise InputError(f"{files['table'][0].name} lacks video_id or sentence")
            captions.setdefault(row["video_id"], []).append(row["sentence"])
        return files["table"][:1], captions
    listed, path = files["list"][0], files["captions"][0]
    if path.stat().st_size > MAX_PICKLE_BYTES:
        raise InputError(f"{path} has more than {MAX_PICKLE_BYTES >> 20} MB, expected about 10")
    try:
        with path.open("rb") as file:
            words = _PlainUnpickler(file).load()
        names = listed.read_text(encoding="utf-8").split()
        captions = {name: [" ".join(text) for text in words[name]] for name in names}
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}; copy the file again") from error
    return [listed, path], captions


def _index(root: Path, folders: list[str]) -> dict[str, Path]:
    """Return videos and folders of frames by name."""
    found: dict[str, Path] = {}
    for folder in (root / name for name in folders):
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            if path.suffix.lower() in VIDEO_SUFFIXES:
                found.setdefault(path.stem, path)
            elif path.suffix.lower() in IMAGE_SUFFIXES:
                found.setdefault(path.parent.name, path.parent)
    return found


def run_video_retrieval(
    model: Model,
    data: VideoData,
    task: Task,
    *,
    compat: str = "corrected",
    folder: Path | None = None,
    workers: Workers = ALONE,
    progress: Callable[[int], None] = lambda done: None,
) -> TaskResult | None:
    """Return a task's result, both ways; None in processes other than the first."""
    parts = [folder / f"{task.name}-{side}" if folder else None for side in ("captions", "videos")]
    texts = embed_all(model, data.captions, folder=parts[0], workers=workers, progress=progress)
    videos = embed_all(model, data.videos, folder=parts[1], workers=workers, progress=progress)
    if workers.rank:
        return None
    started = time.perf_counter()
    result = TaskResult(task.metric)
    result.problems = [vars(problem) for problem in data.problems]
    bad = {data.names[number]: reason for number, reason in videos.bad.items()}
    bad |= {f"caption {number + 1}": reason for number, reason in texts.bad.items()}
    result.problems += [{"record": name, "message": reason} for name, reason in bad.items()]
    if bad or not data.videos:  # a matrix with holes has no ranks
        return result
    similarity = np.concatenate(  # [captions, videos]
        [
            dot(block.astype(np.float64), videos.rows(np.arange(len(data.videos))))
            for _, block in texts.blocks(1024)
        ]
    )
    owner = np.array(data.owner)
    by_text, by_video = ranks(similarity, owner)
    scores = {f"t2v {name}": value for name, value in recall_summary(by_text).items()}
    scores |= {f"v2t {name}": value for name, value in recall_summary(by_video).items()}
    official = official_scores(similarity, owner)
    differing = {name: value for name, value in official.items() if value != scores[name]}
    if compat == "official":
        scores, differing = official, {}
    result.scores, result.official = scores, differing
    result.values = {"t2v R@1": (by_text == 1).astype(float)}
    result.intervals = {
        f"{side} R@{k}": interval((found <= k).astype(float))
        for side, found in (("t2v", by_text), ("v2t", by_video))
        for k in (1, 5, 10)
    }
    result.n, result.ids = len(by_text), [f"{data.names[o]}#{i}" for i, o in enumerate(owner)]
    result.samples = [_sample(data, i, similarity[i], int(r)) for i, r in enumerate(by_text)]
    result.info = {
        "videos": len(data.videos),
        "data": data_fingerprint(data.sources),
        "seconds": {
            "embed captions": round(texts.seconds, 2),
            "embed videos": round(videos.seconds, 2),
            "score": round(time.perf_counter() - started, 2),
        },
        "embedded": texts.computed + videos.computed,
    }
    return result


def ranks(similarity: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each caption's rank of its video, and each video's rank of its captions.

    Args:
        similarity: [captions, videos].
        owner: [captions], the video of each.
    """
    one = np.ones(1)
    by_text = [
        rank(row, Relevant(np.array([video]), one)).ranks[0]
        for row, video in zip(similarity, owner, strict=True)
    ]
    best = best_of_sets(similarity, owner)
    by_video = [
        rank(best[:, v], Relevant(np.array([v]), one)).ranks[0] for v in range(best.shape[1])
    ]
    return np.array(by_text), np.array(by_video)


def best_of_sets(similarity: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Return [sets of captions, videos], the best similarity of each set with each video."""
    best = np.full((similarity.shape[1],) * 2, -np.inf, similarity.dtype)
    np.maximum.at(best, owner, similarity)
    return best


def official_scores(similarity: np.ndarray, owner: np.ndarray) -> dict[str, float]:
    """Return the scores that CLIP4Clip prints.

    With one caption per video, every tie counts once more. With several, ties are resolved by
    position, and the median of text to video is the lower of the two middle ranks.
    """
    best = best_of_sets(similarity, owner)
    if len(owner) == similarity.shape[1]:
        found = {f"t2v {k}": v for k, v in recall_summary(clip4clip_ranks(similarity)).items()}
    else:
        order = [
            rank(row, Relevant(np.array([video]), np.ones(1)), "order").ranks[0]
            for row, video in zip(similarity, owner, strict=True)
        ]
        found = {f"t2v {k}": v for k, v in recall_summary(np.array(order)).items()}
        found["t2v MdR"] = float(np.sort(order)[(len(order) - 1) // 2])
    by_video = recall_summary(clip4clip_ranks(best.T))
    return found | {f"v2t {name}": value for name, value in by_video.items()}


def _sample(data: VideoData, number: int, scores: np.ndarray, found: int) -> dict[str, Any]:
    order = np.argsort(-scores, kind="stable")[:5]

    def shown(video: int) -> dict[str, Any]:
        entry = data.videos[video].describe()
        return {"id": data.names[video], "text": "", "images": entry.get("images", [])[:1]}

    return {
        "id": str(number),
        "query": {"text": data.captions[number].text},
        "ranks": [found],
        "truth": [shown(data.owner[number])],
        "top": [shown(int(v)) | {"score": round(float(scores[v]), 5)} for v in order],
    }
