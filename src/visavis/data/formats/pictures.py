"""Folders of pictures, one folder a class: a picture as query, the name of its class as target."""

from __future__ import annotations

from pathlib import Path

from visavis.data.formats.place import Options, Place
from visavis.data.formats.rows import Row
from visavis.data.samples import Match
from visavis.errors import TrainError
from visavis.processing.opening import find_images
from visavis.prompt import Prompt


class PictureOptions(Options):
    """Options of `images`.

    Args:
        text: the target, with the class's name for `{}`.
    """

    text: str = "{}"


class Folder:
    """A row for each picture below the folders of a folder.

    Raises:
        TrainError: there are none, or some lie beside the folders.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise TrainError(f"{path} is no folder, expected one with a folder of pictures a class")
        self.path = path
        self.pictures = find_images(path)
        bare = [picture for picture in self.pictures if picture.parent == path]
        if bare:
            raise TrainError(
                f"{path} holds {len(bare)} pictures beside its folders, the first is "
                f"{bare[0].name}; expected each picture in the folder of its class."
            )

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, number: int) -> Row:
        name = self.pictures[number].relative_to(self.path)
        return {"id": name.as_posix(), "class": name.parts[0]}

    def where(self, number: int) -> str:
        return str(self.pictures[number])


def classified(row: Row, place: Place, options: PictureOptions) -> Match:
    """Return a picture with the name of its class, underscores as blanks."""
    text = options.text.replace("{}", row["class"].replace("_", " "))
    return Match(row["id"], Prompt.of(place.image(row["id"])), Prompt.of(text), group=row["class"])
