"""What nano finds, names and answers on the parts of the data sets that were held out.

    python benchmarks/nano_quality.py nano --data DATA --json scores.json --sheet sheet.png

DATA is the folder that `visavis.data.datasets` describes. Intervals are 95 %, of a bootstrap over
images (1,000 draws). `--features OUT/features` takes images' features from a training run, or
computes them in bfloat16 as training does: many times faster. `--tests` adds the test splits
(coco-mini, grocery-store/test, easy-vqa/test).
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import visavis
from visavis.checkpoints.checkpoint import has_bf16_instructions
from visavis.data.datasets import Record, load_source
from visavis.data.kinds import with_article
from visavis.inputs import Image, Prompt
from visavis.train.feature_store import FeatureStore

PHOTOS = (
    "coco-open",
    "commons-animals",
    "gcompris-pictures",
    "caltech101",
    "caltech101/val-new",
    "misc-open-photos",
    "oxford-pets",
    "recipes-food",
    "tf-flowers",
    "grocery-store",
    "scratch-backgrounds",
    "us-national-parks",
    "trashnet",
    "lire-sports-cars",
    "openstax-figures-2",
)
FIND = ("tuxpaint-stamps", "fluent-emoji", "openclipart", "openstax-figures", "openstax-figures-2")
NAME = ("oxford-pets", "tf-flowers", "recipes-food", "commons-animals", "caltech101")
CHAT = ("caltech101", "oxford-pets", "tf-flowers", "commons-animals", "misc-open-photos")
CHAT += ("gcompris-pictures", "caltech101/val-new")
CALTECH_NAMES = (  # the names of all 101 classes, those that DATA does not hold included
    "face, easy face, leopard, motorbike, accordion, airplane, anchor, ant, barrel, bass, beaver, "
    "binocular, bonsai, brain, brontosaurus, buddha, butterfly, camera, cannon, car, ceiling fan, "
    "cellphone, chair, chandelier, cougar body, cougar face, crab, crayfish, crocodile, crocodile "
    "head, cup, dalmatian, dollar bill, dolphin, dragonfly, electric guitar, elephant, emu, "
    "euphonium, ewer, ferry, flamingo, flamingo head, garfield, gerenuk, gramophone, grand piano, "
    "hawksbill, headphone, hedgehog, helicopter, ibis, inline skate, joshua tree, kangaroo, ketch, "
    "lamp, laptop, llama, lobster, lotus, mandolin, mayfly, menorah, metronome, minaret, nautilus, "
    "octopus, okapi, pagoda, panda, pigeon, pizza, platypus, pyramid, revolver, rhino, rooster, "
    "saxophone, schooner, scissors, scorpion, sea horse, snoopy, soccer ball, stapler, starfish, "
    "stegosaurus, stop sign, strawberry, sunflower, tick, trilobite, umbrella, watch, water lilly, "
    "wheelchair, wild cat, windsor chair, wrench, yin yang"
)
CALTECH = [name.strip() for name in CALTECH_NAMES.split(",")]
SYNONYMS = {
    "face": "person man woman boy girl people portrait",
    "car": "vehicle automobile",
    "cougar body": "cougar puma",
    "cougar face": "cougar puma",
    "crocodile head": "crocodile alligator",
    "flamingo head": "flamingo",
    "cellphone": "phone telephone",
    "binocular": "binoculars",
    "rhino": "rhinoceros",
    "inline skate": "skate rollerblade",
    "headphone": "headphones earphone",
    "water lilly": "lily lotus",
    "ketch": "sailboat yacht boat",
    "watch": "wristwatch clock",
    "gramophone": "phonograph",
    "hawksbill": "turtle",
    "ibis": "bird",
    "gerenuk": "antelope gazelle",
    "stegosaurus": "dinosaur",
    "cat": "kitten",
    "dog": "puppy",
}
ASKED = 30  # photos of a set that are asked about, spread over it
QUESTION = "What is in this picture?"
QUERIES = (
    "a cat",
    "a dog",
    "a horse",
    "a bird",
    "a red car",
    "people skiing in the snow",
    "a baseball player",
    "a tennis player",
    "food on a plate",
    "pizza",
    "an elephant",
    "a boat on the water",
    "an airplane",
    "a train",
    "a flower",
    "a bathroom",
    "a kitchen",
    "a motorcycle",
    "a giraffe",
    "a bear",
    "a child",
    "a guitar",
    "a beach",
    "mountains",
    "a city street",
    "a wooden chair",
    "a computer",
    "fruit",
    "a soldier",
    "a microscope",
)


ABSENT = (
    "an octopus",
    "a rocket launch",
    "a tax form",
    "cells under a microscope",
    "the moon",
    "a lighthouse",
    "a violin",
    "a dinosaur skeleton",
    "a map of Europe",
    "a submarine",
)


def interval(values: Sequence[float]) -> dict[str, float]:
    """Return the mean and its 95 % interval of a bootstrap."""
    array = np.asarray(values, float)
    draws = np.random.default_rng(0).integers(0, len(array), (1000, len(array)))
    low, high = np.percentile(array[draws].mean(1), (2.5, 97.5))
    return {"score": round(float(array.mean()), 3), "low": round(low, 3), "high": round(high, 3)}


def load(name: str, data: Path) -> list[Record]:
    return load_source(name if "/" in name else f"{name}/val", data)


class Bench:
    """A model, the held-out records, and the vectors of their images."""

    def __init__(self, model: visavis.Model, data: Path, features: Path | None = None) -> None:
        self.model, self.data, self.store = model, data, None
        if features is not None:
            assert model.processor is not None
            half = has_bf16_instructions()  # as training does
            self.store = FeatureStore(features, model.vlm, model.processor, half=half)
        self.sets = {name: load(name, data) for name in dict.fromkeys((*PHOTOS, *FIND))}
        self.images = {name: self.see(records) for name, records in self.sets.items()}

    def see(self, records: Sequence[Record]) -> np.ndarray:
        """Return the vectors of records' images."""
        images = [Image(record.image) for record in records]
        if self.store is None:
            return self.model.embed(images)
        head, keys = self.model.vlm.head, [record.key for record in records]
        assert head is not None
        self.store.add(images, keys)
        with torch.inference_mode():
            vectors = F.normalize(head.image(self.store.means(images, keys)), dim=-1)
        return vectors.numpy()

    def everyday(self, captions: Sequence[Record], own: np.ndarray) -> dict[str, dict[str, float]]:
        """Return recall of captions among their own photos and all held-out photos."""
        others = [self.images[name] for name in PHOTOS if name != "coco-open"]
        pool = np.concatenate([own, *others])
        texts = [text for record in captions for text in record.captions]
        owners = np.repeat(np.arange(len(captions)), [len(one.captions) for one in captions])
        scores = self.model.embed(texts) @ pool.T
        ranks = (scores > scores[np.arange(len(texts)), owners][:, None]).sum(1)
        among = (scores[:, : len(own)] > scores[np.arange(len(texts)), owners][:, None]).sum(1)
        found = {f"R@{k} of {len(pool)} photos": interval(ranks < k) for k in (1, 10)}
        return found | {f"R@{k} of {len(own)} photos": interval(among < k) for k in (1, 10)}

    def finding(self, name: str) -> dict[str, dict[str, float]]:
        texts = self.model.embed([record.caption for record in self.sets[name]])
        scores = texts @ self.images[name].T
        ranks = (scores > scores.diagonal()[:, None]).sum(1)
        return {f"R@{k} of {len(texts)}": interval(ranks < k) for k in (1, 10)}

    def naming(self, name: str, names: Sequence[str]) -> dict[str, float]:
        texts = self.model.embed([f"a photo of {with_article(one)}" for one in names])
        best = (self.images[name] @ texts.T).argmax(1)
        right = [names[i] == r.label for i, r in zip(best, self.sets[name], strict=True)]
        return interval(right)

    def embedding(self) -> dict[str, object]:
        """Return every retrieval and zero-shot score."""
        found: dict[str, object] = {
            "everyday captions (coco-open)": self.everyday(
                self.sets["coco-open"], self.images["coco-open"]
            )
        }
        found |= {f"{name}, text to image": self.finding(name) for name in FIND}
        for name in NAME:
            records = [*load_source(name, self.data), *self.sets[name]]
            names = CALTECH if name == "caltech101" else sorted({r.label for r in records})
            found[f"{name}, name among {len(names)}"] = self.naming(name, names)
        found["caltech101, classes nobody trained on, name among 101"] = self.naming(
            "caltech101/val-new", CALTECH
        )
        return found

    def calibration(self) -> dict[str, float]:
        """Return what scores mean: of everyday captions with their own photos, and of searches for
        things that no photo shows.

        nano's `min_score` is the value that nine of ten captions exceed with their own photo.
        """
        photos, own = self.sets["coco-open"], self.images["coco-open"]
        texts = [text for record in photos for text in record.captions]
        owners = np.repeat(own, [len(record.captions) for record in photos], 0)
        pairs = (self.model.embed(texts) * owners).sum(1)
        found = {
            f"caption and its photo, {p} % below": np.percentile(pairs, p) for p in (5, 10, 25)
        }
        absent = self.model.embed(list(ABSENT)) @ own.T
        found["best of 83 photos for what none shows, median"] = float(np.median(absent.max(1)))
        return {key: round(float(value), 3) for key, value in found.items()}

    def chat(self) -> dict[str, object]:
        """Return how often answers name the main thing, and how presence is answered."""
        found: dict[str, object] = {}
        every: list[float] = []
        sets = {name: self.sets[name][:: -(-len(self.sets[name]) // ASKED)] for name in CHAT}
        for name, records in sets.items():
            prompts = [Prompt.chat(QUESTION, [Image(record.image)]) for record in records]
            replies = self.model.chat_many(prompts, max_new_tokens=24)
            named = [names_it(reply.text, r) for reply, r in zip(replies, records, strict=True)]
            found[f"{name}, answer names it ({len(records)})"] = interval(named)
            every += named if name != "caltech101/val-new" else []
        found[f"all but new classes ({len(every)})"] = interval(every)
        asked = [
            (record, question, answer)
            for records in sets.values()
            for record in records
            for question, answer in record.questions
            if answer in ("Yes", "No")
        ]
        prompts = [Prompt.chat(question, [Image(one.image)]) for one, question, _ in asked]
        replies = self.model.chat_many(prompts, max_new_tokens=4)
        right = [
            reply.text.strip().lower().startswith(answer.lower())
            for reply, (_, _, answer) in zip(replies, asked, strict=True)
        ]
        said_yes = [reply.text.strip().lower().startswith("yes") for reply in replies]
        found[f"is it there, half yes ({len(asked)})"] = interval(right)
        found["share of answers that are yes"] = round(float(np.mean(said_yes)), 3)
        return found

    def tests(self) -> dict[str, object]:
        """Return the scores of the test splits."""
        records = load_source("coco-mini/val", self.data)
        own = self.see(records)
        found: dict[str, object] = {"coco-mini, everyday captions": self.everyday(records, own)}
        shelf = load_source("grocery-store/test", self.data)
        self.sets["shelf"] = shelf
        self.images["shelf"] = self.see(shelf)
        names = sorted({record.label for record in shelf})
        found[f"grocery-store/test, name among {len(names)}"] = self.naming("shelf", names)
        shapes = load_source("easy-vqa/test", self.data)[::16]
        asked = [(r, *pair) for r in shapes for pair in r.questions[::2]]
        prompts = [Prompt.chat(question, [Image(one.image)]) for one, question, _ in asked]
        replies = self.model.chat_many(prompts, max_new_tokens=6)
        right = [
            clean(reply.text) == clean(answer)
            for reply, (_, _, answer) in zip(replies, asked, strict=True)
        ]
        found[f"easy-vqa/test ({len(asked)})"] = interval(right)
        return found

    def sheet(self, path: Path, num: int = 500) -> list[dict[str, str]]:
        """Draw the best hits of everyday queries over held-out photos, and return 30 captions."""
        from visavis.demo.sheet import SheetRow, draw_sheet
        from visavis.processing.images import decode_image

        photos = [record for name in PHOTOS for record in self.sets[name]]
        vectors = np.concatenate([self.images[name] for name in PHOTOS])
        chosen = np.random.default_rng(0).permutation(len(photos))[:num]
        queries = self.model.embed(list(QUERIES))
        rows = []
        for query, vector in zip(QUERIES, queries, strict=True):
            scores = vectors[chosen] @ vector
            best = np.argsort(-scores)[:4]
            hits = [
                ("", float(scores[i]), decode_image(Image(photos[chosen[i]].image))) for i in best
            ]
            rows.append(SheetRow(f"“{query}”", hits, None))
        draw_sheet("nano", f"{num} held-out photos, cosine similarity", rows).save(path)
        shown = [photos[i] for i in chosen[:30]]
        prompts = [Prompt.chat("Describe this picture.", [Image(one.image)]) for one in shown]
        replies = self.model.chat_many(prompts, max_new_tokens=40)
        return [
            {"image": one.key, "people wrote": one.label or one.caption[:80], "nano": reply.text}
            for one, reply in zip(shown, replies, strict=True)
        ]


def names_it(answer: str, record: Record) -> bool:
    """Return whether an answer holds a record's class, its last word, group or a synonym."""
    names = {record.label, record.label.split()[-1], record.group} - {"", "head", "body"}
    for name in (record.label, record.group):
        names |= set(SYNONYMS.get(name, "").split())
    said = f" {' '.join(re.findall('[a-z]+', answer.lower()))} "
    return any(f" {name.lower()}{end} " in said for name in names for end in ("", "s", "es"))


def clean(text: str) -> str:
    return text.strip().lower().rstrip(".")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--features", type=Path, help="`features` of a training run")
    parser.add_argument("--tests", action="store_true")
    parser.add_argument("--no-chat", action="store_true")
    given = parser.parse_args()
    bench = Bench(visavis.load(given.model), given.data, given.features)
    found: dict[str, object] = {"embedding": bench.embedding()}
    found["calibration"] = bench.calibration()
    if not given.no_chat:
        found["chat"] = bench.chat()
    if given.tests:
        found["tests"] = bench.tests()
    if given.sheet:
        found["captions"] = bench.sheet(given.sheet)
    text = json.dumps(found, indent=1, ensure_ascii=False)
    print(text)
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
