"""The house rules that a program can check: imports, file length, docstrings, the file tree.

The tree in docs/architecture.md is a fenced block whose first line is `src/visavis/`. Below it
every line is an indentation (or box drawing), one or more names, two spaces or more, and half a
line of text:

    src/visavis/
      inputs.py            what a user may pass
      model/
        vision/
          vit.py           CLIP, SigLIP and DINOv2

Every name must exist, and every module of the package must be named.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

import visavis

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "src" / "visavis"
MODULES = sorted(PACKAGE.rglob("*.py"))
PYTHON_FILES = sorted(
    path
    for folder in ("src", "tests", "benchmarks", "recipes")
    for path in (REPOSITORY / folder).rglob("*.py")
)
MAX_LINES = 500

# A part imports only from parts of its own row or of rows above it. CONTRIBUTING.md and
# docs/architecture.md state the same lines.
DIRECTIONS = """\
errors, memory, utils, inputs, native
  <- model
  <- processing
  <- generate, checkpoints
  <- data
  <- embedder, reranker, api
  <- train, evaluate, index, convert, interop, bench
  <- serve, cli, demo
"""
ROWS = [re.findall(r"\w+", line) for line in DIRECTIONS.splitlines()]
RANK = {part: rank for rank, row in enumerate(ROWS) for part in row}
RANK |= {"__init__": RANK["api"] + 1, "__main__": len(ROWS)}  # the public names, the program

# Test peers and tools that must never be needed to run the package.
# `convert --verify` asks the peer itself where it is installed: this one file may import them.
PEER_RUNNER = PACKAGE / "convert" / "verify.py"
PEERS = {"transformers", "torchvision", "timm", "gguf", "xllamacpp", "llama_cpp", "pytest"}

# What would let the model core touch files, the network or text.
OUTSIDE_MODEL = {
    *{"os", "io", "pathlib", "shutil", "tempfile", "json", "socket", "ssl", "http", "urllib"},
    *{"requests", "httpx", "huggingface_hub", "safetensors", "tokenizers", "jinja2", "PIL"},
}


def relative(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def part_of(module: str) -> str:
    """Return the part that a dotted module name belongs to: "visavis.model.vlm" -> "model"."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def module_name(path: Path) -> str:
    names = ["visavis", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imported_modules(path: Path) -> Iterator[str]:
    """Yield the full name of every module that a file imports, lazily or not."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: write imports in full"
            assert node.module is not None
            for alias in node.names:
                assert alias.name != "*", f"{relative(path)}:{node.lineno}: wildcard import"
                # `from visavis import model` imports the submodule, where there is one.
                is_part = node.module == "visavis" and alias.name in RANK
                yield f"visavis.{alias.name}" if is_part else node.module


@cache
def part_imports() -> dict[str, dict[str, str]]:
    """Return for each part the other parts it imports, each with a file that does so."""
    graph: dict[str, dict[str, str]] = {}
    for path in MODULES:
        edges = graph.setdefault(part_of(module_name(path)), {})
        for target in imported_modules(path):
            if target.split(".")[0] == "visavis":
                edges.setdefault(part_of(target), f"{relative(path)} imports {target}")
    return graph


@cache
def file_imports() -> dict[str, set[str]]:
    """Return for each module of the package the modules it imports, inside functions too.

    Imports under `if TYPE_CHECKING:` do not count: they never run.
    """
    modules = {module_name(path): path for path in MODULES}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        targets = graph.setdefault(name, set())
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                node.body = []  # ast.walk visits children after this
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                targets |= (inner & modules.keys()) or {node.module}
        targets &= modules.keys() - {name}
    return graph


def find_file_circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return each group of modules that import each other in a circle."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        found, waiting = set[str](), list(graph[start])
        while waiting:
            if (module := waiting.pop()) not in found:
                found.add(module)
                waiting += graph[module]
        reached[start] = found
    groups = {
        tuple(sorted(other for other in reached[name] if name in reached[other]))
        for name in graph
        if name in reached[name]
    }
    return [list(group) for group in sorted(groups)]


def find_circle(graph: dict[str, dict[str, str]]) -> list[str]:
    """Return the parts of one import circle, its first repeated at the end, or nothing."""

    def walk(part: str, trail: list[str]) -> list[str]:
        if part in trail:
            return [*trail[trail.index(part) :], part]
        for target in graph.get(part, {}):
            if target != part and (circle := walk(target, [*trail, part])):
                return circle
        return []

    return next((circle for part in graph if (circle := walk(part, []))), [])


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_part_has_a_row() -> None:
    parts = {part_of(module_name(path)) for path in MODULES}
    assert parts - set(RANK) == set(), "give the new part its row in DIRECTIONS"


def test_imports_go_one_way() -> None:
    wrong = [
        reason
        for part, edges in part_imports().items()
        for target, reason in edges.items()
        if RANK[target] > RANK[part]
    ]
    assert wrong == []


def test_no_part_imports_in_a_circle() -> None:
    graph = part_imports()
    circle = find_circle(graph)
    assert circle == [], [graph[part][target] for part, target in pairwise(circle)]


def test_no_file_imports_in_a_circle() -> None:
    assert find_file_circles(file_imports()) == []


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert find_file_circles(graph) == [["b", "c"]]
    assert find_circle({"a": {"a": "", "b": ""}, "b": {"c": ""}, "c": {}}) == []
    assert find_circle({"a": {"b": ""}, "b": {"c": ""}, "c": {"b": ""}}) == ["b", "c", "b"]


def test_model_knows_no_files_network_or_text() -> None:
    wrong = [
        f"{relative(path)} imports {name}"
        for path in MODULES
        if part_of(module_name(path)) == "model"
        for name in imported_modules(path)
        if name.split(".")[0] in OUTSIDE_MODEL or part_of(name) == "processing"
    ]
    assert wrong == []


def test_peers_are_not_imported() -> None:
    wrong = [
        f"{relative(path)} imports {name}"
        for path in MODULES
        if path != PEER_RUNNER
        for name in imported_modules(path)
        if name.split(".")[0] in PEERS
    ]
    assert wrong == []


@pytest.mark.parametrize("path", PYTHON_FILES, ids=relative)
def test_file_is_short_and_opens_with_a_docstring(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    num_lines = text.count("\n")
    assert num_lines < MAX_LINES, f"{num_lines} lines: is there a second concept inside?"
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring, "state in a docstring what the file is"
    assert text.startswith(('"""', 'r"""')), "the docstring comes first"


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_import_directions_are_stated_alike(page: str) -> None:
    assert f"```text\n{DIRECTIONS}```" in (REPOSITORY / page).read_text(encoding="utf-8")


def test_every_folder_is_a_package() -> None:
    folders = {path.parent for path in MODULES}
    assert [relative(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []
    assert (PACKAGE / "py.typed").is_file()


def test_import_leaves_torch_alone() -> None:
    code = "import sys, visavis; print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])"
    assert run_python(code).strip() == "[]"


def test_help_leaves_torch_alone() -> None:
    code = (
        "import sys\n"
        "from visavis.cli import main\n"
        "sys.argv = ['visavis', '--help']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        "print('torch' in sys.modules)\n"
    )
    printed = run_python(code).rstrip().splitlines()
    assert any("visavis" in line for line in printed[:-1])
    assert printed[-1] == "False"


def test_version_is_the_changelogs() -> None:
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(visavis.__version__)}\b", changelog, re.MULTILINE)


# --- README ---------------------------------------------------------------------------------------


def read_tree(page: str) -> list[str]:
    """Return the paths that the tree of a page names, folders ending in a slash.

    Example:
        "src/visavis/\n  model/\n    vlm.py  all parts" -> ["src/visavis/model/", ".../vlm.py"]
    """
    block = re.search(r"^```\w*\n(src/visavis/\s[^`]*)^```", page, re.MULTILINE)
    assert block, "docs/architecture.md has no fenced tree that starts with src/visavis/"
    first, *lines = block[1].splitlines()
    folders = [(-1, first.split()[0])]  # (indentation, path)
    paths = []
    for line in filter(str.strip, lines):
        drawn = re.match(r"[\s│├└─]*", line)
        assert drawn is not None
        indentation = drawn.end()
        while folders[-1][0] >= indentation:
            folders.pop()
        names = re.split(r"\s{2,}", line[indentation:])[0].split()
        paths += [folders[-1][1] + name for name in names]
        if names[-1].endswith("/"):
            folders.append((indentation, paths[-1]))
    return paths


@pytest.fixture(scope="module")
def readme() -> str:
    return (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_tree_is_read_with_folders_and_several_names() -> None:
    tree = "```\nsrc/visavis/  all\n  a.py b.py  two\n  c/\n    d.py  in c\n  e.py  after\n```\n"
    expected = ["a.py", "b.py", "c/", "c/d.py", "e.py"]
    assert read_tree(tree) == ["src/visavis/" + name for name in expected]
    drawn = "```text\nsrc/visavis/\n├── c/\n│   └── d.py  in c\n└── e.py  after\n```\n"
    assert read_tree(drawn) == ["src/visavis/" + name for name in expected[2:]]


@pytest.fixture(scope="module")
def architecture() -> str:
    return (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_tree_names_what_exists(architecture: str) -> None:
    missing = [
        path
        for path in read_tree(architecture)
        if not (
            (REPOSITORY / path).is_dir() if path.endswith("/") else (REPOSITORY / path).is_file()
        )
    ]
    assert missing == []


def test_tree_names_every_module(architecture: str) -> None:
    modules = {relative(path) for path in MODULES if path.name != "__init__.py"}
    assert sorted(modules - set(read_tree(architecture))) == []


def test_readme_links_lead_somewhere(readme: str) -> None:
    links = re.findall(r"\]\(([^)#\s]+)|<img[^>]* src=\"([^\"]+)\"", readme)
    local = [link or image for link, image in links if "://" not in (link or image)]
    assert [link for link in local if not (REPOSITORY / link).exists()] == []


def test_readme_make_targets_exist(readme: str) -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
    mentioned = set(re.findall(r"(?:^|`)make ([a-z-]+)", readme, re.MULTILINE))
    assert {"demo", "test"} <= mentioned <= targets
