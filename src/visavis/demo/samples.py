"""Sample images contained in installed packages, with their licences.

Only images with a licence stated by their package are listed, and only those in its wheel, so
nothing is downloaded. The packages are not imported. `docs/sample-images.md` has the same table.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from visavis.errors import InputError


@dataclass(frozen=True)
class Sample:
    """A sample image: name, package and file, author, licence."""

    name: str
    module: str
    file: str
    credit: str
    licence: str


_CC_BY = "CC BY 2.0"
_CC0 = "CC0 1.0"
_PUBLIC = "public domain"
SAMPLES: tuple[Sample, ...] = (
    Sample("astronaut", "skimage", "data/astronaut.png", "NASA (Eileen Collins)", _PUBLIC),
    Sample("brick wall", "skimage", "data/brick.png", "CC0Textures, Bricks25", _CC0),
    Sample("photographer", "skimage", "data/camera.png", "Lav Varshney", _CC0),
    Sample("cell", "skimage", "data/cell.png", "Paul Müller and others, Opt. Express 2018", _CC0),
    Sample("cat", "skimage", "data/chelsea.png", "Stéfan van der Walt (Chelsea)", _CC0),
    Sample("blurred clock", "skimage", "data/clock_motion.png", "Stéfan van der Walt", _PUBLIC),
    Sample("coffee", "skimage", "data/coffee.png", "Rachel Michetti, Pikolo Espresso Bar", _CC0),
    Sample(
        "ancient coins",
        "skimage",
        "data/coins.png",
        "Brooklyn Museum",
        "no known copyright restrictions",
    ),
    Sample("grass", "skimage", "data/grass.png", "linolafett, DeviantArt", _CC0),
    Sample("gravel", "skimage", "data/gravel.png", "CC0Textures, Gravel04", _CC0),
    Sample("horse", "skimage", "data/horse.png", "Andreas Preuss (marauder), openclipart", _CC0),
    Sample(
        "galaxies", "skimage", "data/hubble_deep_field.jpg", "NASA and ESA, HubbleSite", _PUBLIC
    ),
    Sample(
        "stained tissue",
        "skimage",
        "data/ihc.png",
        "Center for Microscopy and Molecular Imaging",
        "no known copyright restrictions",
    ),
    Sample(
        "retina", "skimage", "data/retina.jpg", "Mikael Häggström, WikiJournal of Medicine", _CC0
    ),
    Sample("rocket launch", "skimage", "data/rocket.jpg", "SpaceX", _PUBLIC),
    Sample("handwriting", "skimage", "data/text.png", "Wikipedia, Corner.png", _PUBLIC),
    Sample("temple", "sklearn", "datasets/images/china.jpg", "danielbuechele, Flickr", _CC_BY),
    Sample("flower", "sklearn", "datasets/images/flower.jpg", "vultilion, Flickr", _CC_BY),
)
PACKAGES = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


def copy_samples(folder: Path, samples: Sequence[Sample] = SAMPLES) -> list[Path]:
    """Copy the sample images into `folder` under their names, with a list of credits.

    Raises:
        InputError: a package that carries some of them is not installed.
    """
    missing = {sample.module for sample in samples if _package_folder(sample.module) is None}
    if missing:
        names = ", ".join(sorted(PACKAGES.get(module, module) for module in missing))
        raise InputError(
            f"the demo's sample pictures come with {names}, which is not installed; run "
            "`pip install 'visavis[demo]'`, or search your own: visavis index add photos.idx FOLDER"
        )
    folder.mkdir(parents=True, exist_ok=True)
    copied, absent = [], []
    for sample in samples:
        package = _package_folder(sample.module)
        assert package is not None
        source = package / sample.file
        target = folder / f"{sample.name.replace(' ', '-')}{source.suffix}"
        if not source.is_file():
            absent.append(f"{PACKAGES[sample.module]}: {sample.file}")
            continue
        if not target.is_file() or target.stat().st_size != source.stat().st_size:
            shutil.copyfile(source, target)
        copied.append(target)
    if not copied:
        raise InputError(
            f"none of the sample pictures is where it was expected ({'; '.join(absent[:3])} …); "
            "install scikit-image 0.24 to 0.26 and scikit-learn, or search your own pictures"
        )
    (folder / "CREDITS.md").write_text(credits_table(samples), encoding="utf-8")
    return copied


def credits_table(samples: Sequence[Sample] = SAMPLES) -> str:
    """Return authors and licences of the images as a Markdown table."""
    lines = ["| image | file | made by | licence |", "|---|---|---|---|"]
    for sample in samples:
        file = f"{PACKAGES[sample.module]}: `{sample.file}`"
        lines.append(f"| {sample.name} | {file} | {sample.credit} | {sample.licence} |")
    return "\n".join(lines) + "\n"


def _package_folder(module: str) -> Path | None:
    """Return where a package lies, without running any of its code."""
    spec = importlib.util.find_spec(module)
    locations = list(spec.submodule_search_locations or ()) if spec else []
    return Path(locations[0]) if locations else None
