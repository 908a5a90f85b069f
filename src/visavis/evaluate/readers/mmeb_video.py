"""The video tasks of MMEB-V2: annotations, folders of frames, and the strings of VLM2Vec's code.

    video-tasks/data/<name>.jsonl, or a clone of VLM2Vec/<Dataset>, beside
    video-tasks/frames/video_{cls,ret,qa,mret}/<Dataset>/<video>/<frame>

Frames are sampled as there: linspace(0, n - 1, 8) as integers, all of them where there are fewer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from visavis.errors import InputError
from visavis.evaluate.items import (
    VISUAL,
    CandidateSet,
    Item,
    MissingFilesError,
    Problem,
    RetrievalData,
)
from visavis.evaluate.metrics import Relevant
from visavis.evaluate.suite import Task
from visavis.evaluate.tables import find_first, iterate_rows
from visavis.inputs import Image, Video

FRAMES = 8
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
VIDEO_SUFFIXES = (".mp4", ".webm", ".avi", ".mov", ".mkv")
Row = dict[str, Any]


def annotation_files(task: Task, root: Path) -> list[Path]:
    """Return a task's annotation files, or nothing."""
    subset = task.get("subset")
    names = task.get("files", [task.name])
    if task.get("form") == "mvbench":
        for name in names:
            for home in ("video-tasks/data", "video_tasks/data", "video-tasks", ""):
                folder = root / home / name
                files = sorted(folder.glob("**/*.json")) or sorted(folder.glob("**/train*.parquet"))
                if files:
                    return files
        return []
    patterns = []
    for name in names:
        homes = ("video-tasks/data", "video_tasks/data", "video-tasks", "", "data")
        for home in homes:
            at = f"{home}/{name}".lstrip("/")
            patterns += [f"{at}.jsonl", f"{at}.json", f"{at}.parquet"]
            patterns += [f"{at}/{subset}/*.parquet", f"{at}/**/{subset}*.json*"] if subset else []
            patterns += [f"{at}/**/test*.parquet", f"{at}/**/val*.parquet", f"{at}/**/*.jsonl"]
    return find_first(root, patterns)


class FrameFinder:
    """Folders of frames, in the official layout and in mirrors of it."""

    def __init__(self, task: Task, root: Path, frames: int) -> None:
        kind, dataset = task.get("frame_folder").split("/")
        variants = dict.fromkeys(
            (dataset, dataset.replace("_", "-"), dataset.replace("-", "_"), *task.get("files", []))
        )
        homes = []
        for base in ("video-tasks", "video_tasks", ""):
            for name in variants:
                homes += [f"{base}/frames/{kind}/{name}", f"{base}/videos/{kind}/{name}"]
                homes.append(f"{base}/frames/{kind}/data/ziyan/video_retrieval/{name}/frames")
                homes.append(f"{base}/{kind}/data/ziyan/video_retrieval/{name}/frames")
                homes.append(f"{base}/{kind}/{name}")
        self.homes = [root / home.lstrip("/") for home in homes]
        self.homes = [home for home in self.homes if home.is_dir()]
        self.frames, self.whole = frames, 0

    def folder(self, name: str) -> Path | None:
        """Return the folder with a name below the task's folder of frames, or None."""
        places = (home / sub / name for home in self.homes for sub in ("", "frames"))
        return next((place for place in places if place.is_dir()), None)

    def video(self, *names: str) -> Video:
        """Return a video of sampled frames, by the first of its names that is there.

        Raises:
            InputError: it is missing, or its folder holds no frames.
        """
        for name in names:
            if (folder := self.folder(name)) is not None:
                return frames_of(folder, self.frames)
            for home in self.homes:
                for suffix in ("", *VIDEO_SUFFIXES):
                    if (file := home / f"{name}{suffix}").is_file():
                        self.whole += 1
                        return Video(file, self.frames)
        looked = ", ".join(map(str, self.homes)) or "no folder of frames"
        raise InputError(
            f"frames of {names[0]} are missing (looked in {looked}); unpack the frames, or copy "
            "that archive again"
        )

    def image(self, name: str) -> Image:
        """Return one image among the frames.

        Raises:
            InputError: it is missing.
        """
        for home in self.homes:
            if (home / name).is_file():
                return Image(home / name)
        raise InputError(f"image {name} is missing among the frames")


def frames_of(folder: Path, frames: int) -> Video:
    """Return the frames of a folder in natural order, at most `frames` of them, evenly spaced.

    Raises:
        InputError: there are none.
    """
    found = [file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
    found.sort(key=lambda file: natural(file.name))
    if not found:
        raise InputError(f"{folder} holds no frames; unpack that archive again")
    if frames <= len(found):
        chosen = np.linspace(0, len(found) - 1, frames, dtype=int)
        found = [found[number] for number in chosen]
    return Video(tuple(Image(file) for file in found), len(found))


def natural(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key that has frame_2 before frame_10."""
    parts = re.split(r"(\d+)", name.lower())
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def read(
    task: Task, root: Path, *, compat: str = "corrected", frames: int = FRAMES
) -> RetrievalData:
    """Return the queries and candidates of a task.

    Raises:
        MissingFilesError: there are no annotations.
        InputError: they are damaged.
    """
    files = annotation_files(task, root)
    if not files:
        raise MissingFilesError(
            f"no annotations of {task.name} below {root}; see --check for commands"
        )
    maker = Maker(task, FrameFinder(task, root, frames), compat)
    data = maker.data
    data.sources = files
    rows = _rows(files, task)
    limit = task.get("limit")
    for number, row in enumerate(rows):
        if limit is not None and number >= limit:
            break
        before = len(maker.candidates.items)
        try:
            maker.add(number, row)
        except (InputError, KeyError, ValueError, TypeError, IndexError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            data.problems.append(Problem(f"{files[0].name}, row {number + 1}", reason))
            assert before <= len(maker.candidates.items)
    for label in task.get("labels", []):
        maker.candidates.add(Item(label, (), "", label), label)
    if task.get("form") in ("labels", "retrieval"):
        data.pools = None
    data.candidates, data.candidate_ids = maker.candidates.items, maker.candidates.ids
    data.notes["frames"] = frames
    if maker.finder.whole:
        data.notes["videos decoded here"] = maker.finder.whole
    if not data.queries and not data.problems:
        raise InputError(f"{files[0]} holds no rows; copy the file again")
    return data


def _rows(files: list[Path], task: Task) -> Iterator[Row]:
    if task.get("form") != "mvbench":
        yield from iterate_rows(files)
        return
    for file in files:
        subset = file.stem if file.suffix == ".json" else file.parent.name
        for row in iterate_rows([file]):
            yield {"subset": subset} | row


class Maker:
    """Turns rows into queries and candidates by the task's form."""

    def __init__(self, task: Task, finder: FrameFinder, compat: str) -> None:
        self.task, self.finder, self.compat = task, finder, compat
        self.candidates = CandidateSet()
        self.data = RetrievalData(pools=[])
        self.query, self.target = task.get("query", ""), task.get("target", "")
        self.clips: dict[str, int] = {}
        forms: dict[str, Callable[[Row], tuple[Item, list[int], list[int]]]] = {
            "labels": self.labels,
            "ssv2": self.ssv2,
            "retrieval": self.retrieval,
            "moments": self.moments,
            "momentseeker": self.momentseeker,
            "videomme": self.videomme,
            "egoschema": self.egoschema,
            "nextqa": self.nextqa,
            "mvbench": self.mvbench,
            "activitynetqa": self.activitynetqa,
        }
        self.form = forms[task.get("form")]

    def add(self, number: int, row: Row) -> None:
        """Add the query of a row with its candidates."""
        query, pool, right = self.form(row)
        self.data.queries.append(query)
        self.data.query_ids.append(str(row.get("question_id", row.get("qid", number))))
        self.data.relevant.append(Relevant.of(dict.fromkeys(right, 1.0)))
        assert self.data.pools is not None
        self.data.pools.append(np.array(list(dict.fromkeys(pool)), np.int64))

    def _label(self, text: str, name: str | None = None) -> int:
        key = ("text", text, text if name is None else name)
        return self.candidates.add(Item(text, (), "", text), text if name is None else name, key)

    def _asked(self, video: Video, instruction: str, text: str = "") -> Item:
        written = f"{VISUAL} {instruction}" + (f" {text}" if text else "")
        return Item(text, (video,), instruction.strip(), written)

    def labels(self, row: Row) -> tuple[Item, list[int], list[int]]:
        """Classification among all labels of the dataset."""
        video = self.finder.video(str(row["video_id"]))
        label = row["pos_text"]
        if label not in self.task.get("labels", [label]):
            raise InputError(f"its label {label!r} is not among the dataset's labels")
        right = self.candidates.add(Item(label, (), "", label), label)
        return self._asked(video, self.task.get("verbatim_query", self.query)), [right], [right]

    def ssv2(self, row: Row) -> tuple[Item, list[int], list[int]]:
        """Classification among the labels that the row lists in `neg_text`."""
        texts = row["neg_text"]
        if row["pos_text"] not in texts:
            raise InputError(f"its label {row['pos_text']!r} is not among its candidates")
        pool = [self._label(text) for text in texts]
        video = self.finder.video(str(row["video_id"]))
        return self._asked(video, self.query), pool, [self._label(row["pos_text"])]

    def retrieval(self, row: Row) -> tuple[Item, list[int], list[int]]:
        """Text to video: the row's video is right, all rows' videos are candidates."""
        text = row[self.task.get("text_field")]
        text = text[0] if isinstance(text, list) else text
        name = str(row[self.task.get("id_field")])
        if self.task.get("id_is_path"):
            name = Path(name).stem
        query = Item(text, (), self.query, f"{self.query} {text}")
        number = self._clip(name, lambda: self.finder.video(name))
        return query, [number], [number]

    def moments(self, row: Row) -> tuple[Item, list[int], list[int]]:
        """One video's clips: folders `positive*` and others beside `query`."""
        name = Path(row["video_path"]).stem
        folder = self.finder.folder(name)
        if folder is None:
            raise InputError(f"the folder of clips {name} is missing")
        video = frames_of(folder / "query", self.finder.frames)
        clips = sorted(clip for clip in folder.iterdir() if clip.is_dir() and clip.name != "query")
        count = self.finder.frames
        pool = [self._clip(str(clip), partial(frames_of, clip, count)) for clip in clips]
        right = [n for n, clip in zip(pool, clips, strict=True) if clip.name.startswith("positive")]
        if not right:
            raise InputError(f"{folder} has no positive clip")
        if self.compat == "official":  # the last one listed is the label there
            right = right[-1:]
        return self._asked(video, self.query, row["query"]), pool, right

    def momentseeker(self, row: Row) -> tuple[Item, list[int], list[int]]:
        """Clips named by the row; the query shows a video, an image or nothing beside its text."""
        shown, text = str(row.get("input_frames") or ""), row["query"]
        if shown.endswith(".mp4"):
            video = self.finder.video("video_frames/" + _flat(shown))
            query = self._asked(
                video,
                "Find the clip that corresponds to the given sentence and video segment:",
                text,
            )
        elif shown.endswith(".jpg"):
            instruction = "Select the video clip that aligns with the given text and image:"
            image = self.finder.image(f"query_{shown}")
            query = Item(text, (image,), instruction, f"{VISUAL} {instruction} {text}")
        else:
            query = Item(text, (), self.query, f"{self.query} {text}")

        def clip(entry: Row) -> int:
            name = "video_frames/" + _flat(entry["output_path"])
            return self._clip(name, lambda: self.finder.video(name))

        right = [clip(entry) for entry in row["positive_frames"]]
        return query, right + [clip(entry) for entry in row["negative_frames"]], right

    def _clip(self, name: str, find: Callable[[], Video]) -> int:
        if name not in self.clips:
            item = Item("", (find(),), self.target, f"{VISUAL} {self.target}")
            self.clips[name] = self.candidates.add(item, name, ("clip", name))
        return self.clips[name]

    def _question(
        self, video: Video, question: str, pairs: list[tuple[str, str]], right: str
    ) -> tuple[Item, list[int], list[int]]:
        """A question with its answers as (text, what tells them apart)."""
        names = [name for _, name in pairs]
        if right not in names:
            raise InputError(f"its answer {right!r} is not among its candidates {names}")
        pool = [self._label(text, name) for text, name in pairs]
        written = f"{VISUAL} {self.query}  {question}"  # the prompt there ends in a blank, too
        return Item(question, (video,), self.query, written), pool, [pool[names.index(right)]]

    def videomme(self, row: Row) -> tuple[Item, list[int], list[int]]:
        """Options such as "A. Three." as candidates without letter and full stop."""
        options = list(row["options"])
        question = row["question"] + "\n" + "\n".join(options)
        video = self.finder.video(str(row["videoID"]))
        right = options["ABCD".index(row["answer"])]
        return self._question(video, question, [(_bare(o), o) for o in options], right)

    def egoschema(self, row: Row) -> tuple[Item, list[int], list[int]]:
        """As Video-MME; the question and the options are joined without a separator."""
        options = list(row["option"])
        video = self.finder.video(str(row["video_idx"]))
        question = row["question"] + " ".join(options)
        right = options[int(row["answer"])]
        return self._question(video, question, [(_bare(o), o) for o in options], right)

    def nextqa(self, row: Row) -> tuple[Item, list[int], list[int]]:
        """Five options in columns a0 to a4."""
        options = [row[f"a{number}"] for number in range(5)]
        video = self.finder.video(str(row["video"]))
        right = options[int(row["answer"])]
        return self._question(
            video, _lettered(row["question"], options)[0], [(o, o) for o in options], right
        )

    def mvbench(self, row: Row) -> tuple[Item, list[int], list[int]]:
        """Options as "(A) text"; frames lie in a folder named after the video's file."""
        question, letters = _lettered(row["question"], row["candidates"])
        if row["answer"] not in row["candidates"]:
            raise InputError(f"its answer {row['answer']!r} is not among its candidates")
        video = self.finder.video(f"{row['subset']}/{row['video']}")
        right = letters[row["candidates"].index(row["answer"])]
        return self._question(video, question, [(option, option) for option in letters], right)

    def activitynetqa(self, row: Row) -> tuple[Item, list[int], list[int]]:
        """Questions with yes and no."""
        question = row["question"] + "? (A) yes; (B) no."
        video = self.finder.video(f"v_{row['video_name']}")
        return self._question(video, question, [("yes", "yes"), ("no", "no")], row["answer"])


def _lettered(question: str, options: list[str]) -> tuple[str, list[str]]:
    letters = [f"({chr(ord('A') + number)}) {text}" for number, text in enumerate(options)]
    return (f"{question}\nOptions:\n" + "\n".join(letters)).rstrip(), letters


def _bare(option: str) -> str:
    """Return "Three" of "A. Three."."""
    return option[option.find(". ") :].strip(". ")


def _flat(path: str) -> str:
    return path.replace("/", "_").split(".mp4")[0]
