"""The official file layouts of every suite in miniature, with real photographs that packages carry.

Each writer makes what the suite's own download scripts leave on disk: the same names, columns and
folders, with 5 to 20 records a task. Texts and labels are made up; images are from scikit-image and
scikit-learn.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
from PIL import Image
from pyarrow import parquet

from visavis.evaluate.suite import Task, load_suite

NAMES = ("astronaut", "chelsea", "coffee", "rocket", "camera", "coins", "page", "moon", "clock")


@cache
def photos() -> dict[str, Image.Image]:
    """Return small copies of real photographs by name."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    found = {name: Image.fromarray(getattr(data, name)()).convert("RGB") for name in NAMES}
    for name, pixels in zip(("china", "flower"), load_sample_images().images, strict=True):
        found[name] = Image.fromarray(np.asarray(pixels)).convert("RGB")
    for image in found.values():
        image.thumbnail((64, 64))
    return found


def save(path: Path, number: int) -> Path:
    """Write one of the photographs, mirrored from the second time on, so that all differ."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(photos())
    image = photos()[names[number % len(names)]]
    if number // len(names):
        image = image.rotate(90 * (number // len(names)), expand=True)
    image.save(path)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    return path


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False))
    return path


def embedded(number: int) -> dict[str, Any]:
    """Return an image as the `datasets` library writes it into parquet."""
    import io

    buffer = io.BytesIO()
    photos()[list(photos())[number % len(photos())]].save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{number}.png"}


# --- MMEB, image tasks ----------------------------------------------------------------------------

TOKEN = "<|image_1|>"


def image_rows(
    task: Task, folder: Path, number: int = 5, *, instruct: bool
) -> list[dict[str, Any]]:
    """Return rows of MMEB-eval or MMEB_Test_Instruct, their images written below `folder`."""
    form, name = task.get("form"), task.name
    query, target = task.get("query", ""), task.get("target", "")
    rows = []
    captioned = (target.endswith(":") and form == "t2i") or name in ("OVEN", "RefCOCO-Matching")
    for i in range(number):
        has_image = form != "t2i"
        path = f"{name}/q{i}.png" if has_image else ""
        if path:
            save(folder / path, i)
        text = "" if name in ("VOC2007", "MSCOCO_i2t", "NIGHTS") else f"{name} text {i}"
        if form in ("i2t", "qa"):
            texts = [f"label {(i + j) % number} of {name}" for j in range(number)]
            paths = [""] * number
        else:
            paths = [f"{name}/t{(i + j) % number}.png" for j in range(number)]
            for j, p in enumerate(paths):
                save(folder / p, i + j)
            texts = [f"caption {(i + j) % number}" if captioned else "" for j in range(number)]
        if instruct:
            rows.append(
                {
                    "qry_inst": (TOKEN + "\n" if has_image else "") + query,
                    "qry_text": text,
                    "qry_img_path": path,
                    "tgt_inst": f"{TOKEN}\n{target}" if target else "",
                    "tgt_text": texts,
                    "tgt_img_path": paths,
                }
            )
            continue
        before = TOKEN + "\n" if has_image else ""
        whole = before + query + (f" {text}" if text else "") + "\n"
        if form not in ("i2t", "qa"):
            end = "\n" if captioned or form == "t2i" else ""
            texts = [f"{TOKEN}\n{target}" + (f" {t}" if t else "") + end for t in texts]
        rows.append(
            {"qry_text": whole, "qry_img_path": path, "tgt_text": texts, "tgt_img_path": paths}
        )
    return rows


def write_mmeb_eval(root: Path, number: int = 5) -> Path:
    """Write TIGER-Lab/MMEB-eval with its images unpacked beside it."""
    for name, task in load_suite("mmeb-v1").tasks.items():
        rows = image_rows(task, root / "eval_images", number, instruct=False)
        write_parquet(root / "MMEB-eval" / name / "test-00000-of-00001.parquet", rows)
    return root


def write_test_instruct(root: Path, number: int = 5, *, layout: str = "v2") -> Path:
    """Write MMEB_Test_Instruct in the layout of MMEB-V2 or of MMEB-V3's set-up."""
    for name, task in load_suite("mmeb-v1").tasks.items():
        images = root / "image-tasks" / ("MMEB" if layout == "v3" else "")
        home = root / ("image-tasks/image-query" if layout == "v3" else "MMEB_Test_Instruct")
        rows = image_rows(task, images, number, instruct=True)
        write_parquet(home / name / "test-00000-of-00001.parquet", rows)
    return root


# --- MMEB-V2, videos and documents ----------------------------------------------------------------


def frames(folder: Path, number: int, count: int = 3) -> None:
    for i in range(count):
        save(folder / f"frame_{i + 1:04d}.jpg", number + i)


def video_row(task: Task, home: Path, i: int) -> dict[str, Any]:
    """Return a row of a video task, its frames written below `home`."""
    form, name = task.get("form"), f"video{i}"
    if form in ("labels", "ssv2"):
        frames(home / name, i)
        labels = task.get("labels", ["Closing something", "Bending something", "Digging something"])
        row = {"video_id": name, "pos_text": labels[i % len(labels)]}
        return row | ({"neg_text": list(labels)} if form == "ssv2" else {})
    if form == "retrieval":
        frames(home / name, i)
        ids = {task.get("id_field"): f"clips/{name}.mp4" if task.get("id_is_path") else name}
        caption = f"a caption of {name}"
        listed = task.name in ("MSVD", "VATEX")
        return ids | {task.get("text_field"): [caption, "another"] if listed else caption}
    if form == "moments":
        for j, clip in enumerate(("query", "positive_1", "negative_1", "negative_2")):
            frames(home / name / clip, i + j)
        return {"query": f"scene {i}", "video_path": f"videos/{name}.mp4"}
    if form == "momentseeker":
        clips = [f"movie/{name}_{j}.mp4" for j in range(3)]
        for j, clip in enumerate(clips):
            frames(home / "video_frames" / clip.replace("/", "_").removesuffix(".mp4"), i + j)
        shown = ["", f"movie{i}.jpg", clips[2]][i % 3]
        if shown.endswith(".jpg"):
            save(home / f"query_{shown}", i)
        return {
            "query": f"moment {i}",
            "input_frames": shown,
            "positive_frames": [{"output_path": clips[0]}],
            "negative_frames": [{"output_path": clips[1]}],
        }
    options = ["a cat", "a dog", "a rocket", "a cup", "a face"]
    lettered = [f"{letter}. {text}." for letter, text in zip("ABCDE", options, strict=True)]
    names = {"mvbench": f"object_shuffle/{name}.mp4", "activitynetqa": f"v_{name}"}
    frames(home / names.get(form, name), i)
    return {
        "videomme": {
            "question": f"What is in it, number {i}?",
            "videoID": name,
            "options": lettered[:4],
            "answer": "ABCD"[i % 4],
            "question_id": f"{i:03d}-1",
            "domain": "d",
            "sub_category": "s",
        },
        "egoschema": {
            "question": f"What happens {i}?",
            "video_idx": name,
            "answer": str(i % 5),
            "question_idx": i,
            "option": lettered,
        },
        "nextqa": {"video": name, "question": f"why {i}", "answer": i % 5, "qid": i, "type": "CW"}
        | {f"a{j}": option for j, option in enumerate(options)},
        "mvbench": {
            "question": f"Where is it {i}?",
            "video": f"{name}.mp4",
            "candidates": options[:3],
            "answer": options[i % 3],
        },
        "activitynetqa": {
            "video_name": name,
            "question": f"is it a cat {i}",
            "answer": ["yes", "no"][i % 2],
            "question_id": f"q_{i}",
        },
    }[form]


def write_videos(root: Path, number: int = 5) -> Path:
    """Write the 18 video tasks of MMEB-V2: JSON lines and folders of frames."""
    for task in load_suite("mmeb-v2").tasks.values():
        if task.reader != "mmeb-video":
            continue
        home = root / "video-tasks/frames" / task.get("frame_folder")
        rows = [video_row(task, home, i) for i in range(number)]
        at = root / "video-tasks/data"
        if task.get("form") == "mvbench":
            write_json(at / "mvbench/object_shuffle.json", rows)
        else:
            write_jsonl(at / f"{task.get('files')[0]}.jsonl", rows)
    return root


def write_pages(root: Path, number: int = 6) -> Path:
    """Write the 24 document tasks of MMEB-V2 in BEIR form, images in the corpus or in folders."""
    for place, task in enumerate(load_suite("mmeb-v2").tasks.values()):
        if task.reader != "beir":
            continue
        folder = root / "visdoc-tasks/data" / task.get("folders")[0]
        ids: list[Any] = list(range(number))
        if task.get("image_names") == "visrag":
            ids = [f"{'a very long name of a page ' * 3}{i}.png" for i in ids]
        corpus = [{"corpus-id": n, "image": embedded(place + i)} for i, n in enumerate(ids)]
        write_parquet(folder / "corpus/test-00000.parquet", corpus)
        queries = [{"query-id": i, "query": f"question {i} about a page"} for i in range(number)]
        write_parquet(folder / "queries/test-00000.parquet", queries)
        qrels = [{"query-id": i, "corpus-id": ids[i], "score": 1 + i % 2} for i in range(number)]
        qrels += [{"query-id": 0, "corpus-id": ids[1], "score": 0}]
        qrels += [{"query-id": 1, "corpus-id": ids[2], "score": 2}]
        write_parquet(folder / "qrels/test-00000.parquet", qrels)
    return root


# --- MMEB-V3, text --------------------------------------------------------------------------------


def write_texts(root: Path, number: int = 5) -> Path:
    """Write the 53 text tasks of MMEB-V3, each in the format and with the fields of its family."""
    for task in load_suite("mmeb-v3").tasks.values():
        if task.reader != "text" or task.status:
            continue
        gold = task.get("qrels") is None  # BRIGHT
        documents, queries, qrels = [], [], []
        for i in range(number):
            names = {"id": f"d{i}", "content": f"document {i}"} if gold else {"_id": f"d{i}"}
            documents.append(
                names if gold else names | {"title": f"title {i}", "text": f"body {i}"}
            )
            row = {"id": str(i), "query": f"query {i}", "gold_ids": [f"d{i}"]}
            if not gold:
                row = {"_id": f"q{i}", "text": f"query {i}"}
            if task.get("instruction_field"):
                row |= {"instruction_og": f"og {i}", "instruction_changed": f"changed {i}"}
            queries.append(row)
            qrels.append({"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1})
        for part, rows in (("corpus", documents), ("queries", queries), ("qrels", qrels)):
            name = task.get(part)
            if name:
                write = write_parquet if name.endswith(".parquet") else write_jsonl
                write(root / name, rows)
    return root
