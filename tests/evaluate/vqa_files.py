"""LLaVA's `playground/data/eval` in miniature: its file names, fields and prompts."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from tests.evaluate.official_files import photos, save, write_json, write_jsonl

WORD = "Answer the question using a single word or phrase."
COLOURS = ("red", "blue", "green", "white", "black", "orange")


def write_vqa(root: Path) -> Path:
    """Write every benchmark of the suite `vqa`, 5 to 12 records each."""
    for write in (gqa, textvqa, scienceqa, vqav2, vizwiz, mme, mmbench, mmvet, pope, seed, mmmu):
        write(root)
    return root


def asked(name: Any, image: str, text: str, **more: Any) -> dict[str, Any]:
    return {"question_id": name, "image": image, "text": text, "category": "default"} | more


def gqa(root: Path) -> None:
    rows, labels = [], {}
    for i in range(6):
        save(root / f"gqa/data/images/n{i}.jpg", i)
        rows.append(asked(f"2{i}", f"n{i}.jpg", f"What colour is thing {i}?\n{WORD}"))
        labels[f"2{i}"] = {"question": f"What colour is thing {i}?", "answer": COLOURS[i]}
    write_jsonl(root / "gqa/llava_gqa_testdev_balanced.jsonl", rows)
    write_json(root / "gqa/data/testdev_balanced_questions.json", labels)


def textvqa(root: Path) -> None:
    rows, data = [], []
    for i in range(6):
        save(root / f"textvqa/train_images/t{i // 2}.jpg", i // 2)
        text = f"What is written, number {i}?\nReference OCR token: STOP, {i}, Main\n{WORD}"
        rows.append(asked(f"t{i // 2}", f"t{i // 2}.jpg", text))
        question = f"what is written, number {i}?"
        answers = ["stop"] * (4 + i) + ["Main St."] * (6 - i)
        data.append({"image_id": f"t{i // 2}", "question": question, "answers": answers})
    write_jsonl(root / "textvqa/llava_textvqa_val_v051_ocr.jsonl", rows)
    write_json(root / "textvqa/TextVQA_0.5.1_val.json", {"data": data})


def scienceqa(root: Path) -> None:
    questions, problems = [], {}
    for i in range(6):
        image = f"{i}/image.png" if i % 2 else None
        if image:
            save(root / f"scienceqa/images/test/{image}", i)
        text = f"Context: N/A\nQuestion: Which one, {i}?\nOptions: (A) this (B) that (C) none"
        value = f"{text}\n<image>" if image else text
        row = {"id": str(i), "conversations": [{"from": "human", "value": value}]}
        questions.append(row | ({"image": image} if image else {}))
        problems[str(i)] = {
            "choices": ["this", "that", "none"],
            "answer": i % 3,
            "image": "image.png" if image else None,
        }
    write_json(root / "scienceqa/llava_test_CQM-A.json", questions)
    write_json(root / "scienceqa/problems.json", problems)
    write_json(root / "scienceqa/pid_splits.json", {"test": list(problems), "train": []})


def vqav2(root: Path) -> None:
    rows = []
    for i in range(8):
        save(root / f"vqav2/test2015/c{i}.jpg", i)
        rows.append(asked(1000 + i, f"c{i}.jpg", f"Is it {i}?\n{WORD}"))
    write_jsonl(root / "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", rows[:6])
    write_jsonl(root / "vqav2/llava_vqav2_mscoco_test2015.jsonl", rows)


def vizwiz(root: Path) -> None:
    rows = []
    for i in range(5):
        save(root / f"vizwiz/test/VizWiz_test_{i:08d}.jpg", i)
        text = f"What is this {i}?\nWhen the provided information is insufficient, respond with "
        text += f"'Unanswerable'.\n{WORD}"
        rows.append(asked(f"VizWiz_test_{i:08d}.jpg", f"VizWiz_test_{i:08d}.jpg", text))
    write_jsonl(root / "vizwiz/llava_test.jsonl", rows)


def mme(root: Path) -> None:
    release = root / "MME/MME_Benchmark_release_version"
    rows = []
    for category, split in (("artwork", True), ("OCR", False), ("code_reasoning", False)):
        for i in range(2):
            home = release / category
            save((home / "images" if split else home) / f"{i:04d}.png", i)
            pairs = [(f"Is this {COLOURS[i]}?", "Yes"), (f"Is this {COLOURS[i + 1]}?", "No")]
            lines = [f"{q} Please answer yes or no.\t{a}\n" for q, a in pairs]
            at = home / "questions_answers_YN" if split else home
            at.mkdir(parents=True, exist_ok=True)
            (at / f"{i:04d}.txt").write_text("".join(lines))
            name = f"{category}/{i:04d}.png"
            image = f"{category}/images/{i:04d}.png" if split else name
            rows += [asked(name, image, f"{q}\n{WORD}", category=category) for q, _ in pairs]
    write_jsonl(root / "MME/llava_mme.jsonl", [*rows, rows[0]])  # LLaVA's file repeats some


def mmbench(root: Path) -> None:
    names: tuple[str, ...] = (
        "index",
        "question",
        "hint",
        "A",
        "B",
        "C",
        "D",
        "answer",
        "category",
        "image",
    )
    names = (*names, "source", "l2-category", "comment", "split")
    for language, path in (
        ("en", "mmbench/mmbench_dev_20230712"),
        ("cn", "mmbench_cn/mmbench_dev_cn_20231003"),
    ):
        lines = ["\t".join(names)]
        for i in range(5):
            buffer = io.BytesIO()
            list(photos().values())[i].save(buffer, "JPEG")
            image = base64.b64encode(buffer.getvalue()).decode()
            hint = "nan" if i % 2 else "Look at it."
            question = f"哪一个 {i}?" if language == "cn" else f"Which one is it, {i}?"
            options = ["a cat", "a dog", "a cup", ""][:4]
            if i == 4:
                options[3] = "a rocket"
            cells = [str(200 + i), question, hint, *options, "ABC"[i % 3], "object", image]
            lines.append("\t".join([*cells, "made", "coarse", "nan", "dev"]))
        file = root / f"{path}.tsv"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def mmvet(root: Path) -> None:
    rows, labels = [], {}
    for i in range(5):
        save(root / f"mm-vet/images/v1_{i}.png", i)
        rows.append({"question_id": f"v1_{i}", "image": f"v1_{i}.png", "text": f"What is x, {i}?"})
        labels[f"v1_{i}"] = {
            "imagename": f"v1_{i}.png",
            "question": f"What is x, {i}?",
            "answer": f"{i}<AND>-{i}",
            "capability": ["math", "ocr"] if i % 2 else ["rec"],
        }
    rows = [row | {"question_id": row["question_id"].removeprefix("v1_")} for row in rows]
    write_jsonl(root / "mm-vet/llava-mm-vet.jsonl", rows)
    write_json(root / "mm-vet/mm-vet.json", labels)


def pope(root: Path) -> None:
    rows, number = [], 0
    for category in ("random", "popular", "adversarial"):
        labels = []
        for i in range(4):
            image = f"COCO_val2014_{i // 2:012d}.jpg"
            save(root / f"pope/val2014/{image}", i // 2)
            text = f"Is there a {COLOURS[i]} thing in the image?"
            rows.append(asked(number, image, f"{text}\n{WORD}", category=category))
            labels.append(
                {"question_id": i + 1, "image": image, "text": text, "label": ["yes", "no"][i % 2]}
            )
            number += 1
        write_jsonl(root / f"pope/coco/coco_pope_{category}.json", labels)
    write_jsonl(root / "pope/llava_pope_test.jsonl", rows)


def seed(root: Path) -> None:
    rows, questions = [], []
    for i in range(6):
        image = f"SEED-Bench-image/s{i}.png" if i < 4 else f"SEED-Bench-video-image/{i}.png"
        save(root / f"seed_bench/{image}", i)
        letter = "Answer with the option's letter from the given choices directly."
        rows.append(asked(str(i), image, f"Which?\nA. a\nB. b\nC. c\nD. d\n{letter}"))
        questions.append(
            {
                "question_id": str(i),
                "answer": "ABCD"[i % 4],
                "data_type": "image" if i < 4 else "video",
                "question_type_id": 1 + i % 2,
            }
        )
    write_jsonl(root / "seed_bench/llava-seed-bench.jsonl", rows)
    types = {"Scene Understanding": 1, "Instance Identity": 2}
    write_json(
        root / "seed_bench/SEED-Bench.json", {"questions": questions, "question_type": types}
    )


def mmmu(root: Path) -> None:
    rows, answers = [], {}
    for i in range(6):
        name = f"validation_Art_Theory_{i}" if i % 2 else f"validation_Math_{i}"
        open_question = i == 4
        row: dict[str, Any] = {"id": name, "prompt": f"What is it, {i}?"}
        row["question_type"] = "open" if open_question else "multiple-choice"
        if i != 5:  # a question about several images has none here
            save(root / f"MMMU/all_images/{name}.png", i)
            row["image"] = f"{name}.png"
        if not open_question:
            row |= {"all_choices": ["A", "B"], "index2ans": {"A": "a cat", "B": "a dog"}}
        rows.append(row)
        truth: Any = ["3.5", "7/2"] if open_question else "AB"[i % 2]
        answers[name] = {"question_type": row["question_type"], "ground_truth": truth}
    write_json(root / "MMMU/anns_for_eval.json", rows)
    write_json(root / "MMMU/eval/answer_dict_val.json", answers)
