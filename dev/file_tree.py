"""Write the file tree of docs/architecture.md anew from the first sentence of each docstring.

python dev/file_tree.py
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "architecture.md"
COLUMN, WIDTH = 30, 96


def first_sentence(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.split("\n\n")[0].split()).replace("`", "")
    return re.split(r"(?<=[.:;])\s", paragraph)[0].rstrip(".:;")


def rows(folder: Path, depth: int) -> Iterator[str]:
    files = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
    packages = sorted(path.parent for path in folder.glob("*/__init__.py"))
    for path in (*files, *packages):
        is_package = path.is_dir()
        name = "  " * depth + path.name + "/" * is_package
        about = first_sentence(path / "__init__.py" if is_package else path)
        row = f"{name:<{COLUMN}}  {about}"
        yield row if len(row) <= WIDTH else row[: WIDTH - 2].rsplit(" ", 1)[0] + " …"
        if is_package:
            yield from rows(path, depth + 1)


def main() -> None:
    tree = "\n".join(["src/visavis/", *rows(REPOSITORY / "src" / "visavis", 1)])
    page = PAGE.read_text(encoding="utf-8")
    block = re.compile(r"```\nsrc/visavis/\n.*?\n```", re.DOTALL)
    page = block.sub(lambda _: f"```\n{tree}\n```", page)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
