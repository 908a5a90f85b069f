"""Each command does its work on a real, tiny checkpoint, for people and as JSON."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

import visavis
from tests.cli.conftest import Run
from tests.fakes import write_pictures
from visavis.cli import app

PROGRAM = [sys.executable, "-m", "visavis"]


def test_chat_streams_and_json_says_more(run: Run, tiny: str, tmp_path: Path) -> None:
    (path,) = write_pictures(tmp_path, 1)
    words = ("chat", tiny, "What is it?", "--image", path, "--max-new-tokens", 5)
    shown = run(*words)
    assert shown.exit_code == 0, shown.output
    whole = json.loads(run(*words, "--json").stdout)
    assert shown.stdout == whole["text"] + "\n"
    assert whole["usage"]["completion_tokens"] == 5
    assert whole["finish_reason"] == "length"
    assert whole["timings"]["prefill_s"] > 0


def test_chat_repeats_with_a_seed(run: Run, tiny: str) -> None:
    words = ("chat", tiny, "hi", "--temperature", 1, "--max-new-tokens", 8, "--seed")
    assert run(*words, 1).stdout == run(*words, 1).stdout
    assert run(*words, 1).stdout != run(*words, 2).stdout


def test_chat_reads_the_question_from_a_pipe(run: Run, tiny: str) -> None:
    piped = run("chat", tiny, "--max-new-tokens", 4, text="What is it?\n")
    assert piped.exit_code == 0, piped.output
    assert piped.stdout == run("chat", tiny, "What is it?", "--max-new-tokens", 4).stdout


def test_chat_talks_on_a_terminal(tiny: str, tmp_path: Path) -> None:
    """Questions and a picture through a real pseudo-terminal; bad files end nothing."""
    pty = pytest.importorskip("pty", reason="needs a Unix pseudo-terminal")
    (path,) = write_pictures(tmp_path, 1)
    ours, theirs = pty.openpty()
    command = [*PROGRAM, "chat", tiny, "--max-new-tokens", "3"]
    child = subprocess.Popen(
        command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    os.close(theirs)
    os.write(ours, f"hello\n/image {path}\nand this?\n/image nowhere.png\nx\n".encode())
    os.write(ours, b"/document nowhere.pdf\nx\n/video\n/new\n\x04")
    out, err = child.communicate(timeout=120)
    os.close(ours)
    assert child.returncode == 0, err
    assert out.count("> ") >= 6
    assert "nowhere.png" in err and "nowhere.pdf" in err and err.count("does not exist") == 2
    assert "Traceback" not in err


def test_embed_prints_unit_vectors(run: Run, tiny: str, tmp_path: Path) -> None:
    (path,) = write_pictures(tmp_path, 1)
    result = run("embed", tiny, "--text", "a cat", "--text", "a dog", "--image", path)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["item"] for line in lines] == ["a cat", "a dog", str(path)]
    vectors = np.array([line["vector"] for line in lines])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    whole = json.loads(run("embed", tiny, "-t", "a cat", "--dim", 8, "--json").stdout)
    assert np.array(whole["vectors"]).shape == (1, 8)


def test_embed_writes_a_file(run: Run, tiny: str, tmp_path: Path) -> None:
    (path,) = write_pictures(tmp_path, 1)
    items = tmp_path / "items.jsonl"
    items.write_text(f'"a cat"\n\n{{"image": "{path}", "text": "what is it?"}}\n')
    result = run("embed", tiny, "--items", items, "--output", "vectors.npy")
    assert result.exit_code == 0, result.output
    written = np.load(tmp_path / "vectors.npy")
    model = visavis.load(tiny)
    expected = model.embed(["a cat", {"image": path, "text": "what is it?"}])
    np.testing.assert_allclose(written, expected, atol=1e-6)


def test_paths_of_items_start_at_their_file(run: Run, tiny: str, tmp_path: Path) -> None:
    """Only a newline ends a line; other separators of Unicode are part of a text."""
    write_pictures(tmp_path / "far" / "images", 2)
    words = "one\u2028two\u2029three\x85four"
    rows = [
        {"image": "images/picture-000.png", "text": words},
        {"image": ["images/picture-000.png", "../far/images/picture-001.png"]},
        words,
    ]
    items = tmp_path / "far" / "items.jsonl"
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    items.write_text(lines, encoding="utf-8-sig")
    found = run("embed", tiny, "--items", "far/items.jsonl", "--json")
    assert found.exit_code == 0, found.output
    whole = json.loads(found.stdout)
    assert whole["items"] == rows
    first, second = (tmp_path / "far" / "images" / f"picture-00{i}.png" for i in range(2))
    wanted = [{"image": first, "text": words}, {"image": [first, second]}, words]
    expected = visavis.load(tiny).embed(wanted)
    np.testing.assert_allclose(np.array(whole["vectors"]), expected, atol=1e-5)


def test_index_add_and_search(run: Run, tiny: str, tmp_path: Path) -> None:
    paths = write_pictures(tmp_path / "pictures", 4)
    (tmp_path / "pictures" / "broken.jpg").write_bytes(b"no picture")
    added = run("index", "add", "p.idx", tmp_path / "pictures", "--model", tiny)
    assert added.exit_code == 0, added.output
    assert added.stdout == "4 added, 1 skipped; p.idx holds 4 items\n"
    assert "broken.jpg" in added.stderr and added.stderr.count("\n") == 1
    again = run("index", "add", "p.idx", tmp_path / "pictures", "--model", tiny, "--json")
    whole = json.loads(again.stdout)
    assert (whole["added"], whole["unchanged"], len(whole["failed"])) == (0, 4, 1)
    found = run("index", "search", "p.idx", "--image", paths[2], "-k", 1, "-m", tiny)
    assert re.fullmatch(rf"1\.000  {re.escape(str(paths[2]))}\n", found.stdout)
    words = ("index", "search", "p.idx", "words", "--filter", "*-00[01].png", "-m", tiny)
    hits = json.loads(run(*words, "--json").stdout)
    assert {Path(hit["source"]).name for hit in hits} == {"picture-000.png", "picture-001.png"}
    paths[0].unlink()
    pruned = run("index", "prune", "p.idx", "--json")
    assert json.loads(pruned.stdout) == {"removed": [str(paths[0])]}


def test_inspect_a_folder(run: Run, tiny: str) -> None:
    whole = json.loads(run("inspect", tiny, "--json").stdout)
    parts = {part["part"]: part["parameters"] for part in whole["parts"]}
    model = visavis.load(tiny)
    assert model.vlm.tower is not None
    assert parts["vision tower"] == sum(p.numel() for p in model.vlm.tower.parameters())
    assert sum(parts.values()) == sum(p.numel() for p in model.vlm.parameters())
    shown = run("inspect", tiny).stdout
    assert "vision tower" in shown and "chatml-bare" in shown and "model.safetensors" in shown


def test_inspect_a_gguf_file(run: Run, nano_files: dict[str, Path]) -> None:
    result = run("inspect", nano_files["language_model"], "--json")
    assert result.exit_code == 0, result.output
    whole = json.loads(result.stdout)
    assert whole["parts"][0]["parameters"] == 134_515_008
    assert "Q4_1" in whole["tensor_types"]


def test_fetch_says_where_the_files_are(run: Run, nano_files: dict[str, Path]) -> None:
    whole = json.loads(run("fetch", "nano", "--json").stdout)
    assert whole == {part: str(path) for part, path in nano_files.items()}


def test_doctor_reports_and_finds_a_broken_torchvision(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run("doctor", "--json")
    whole = json.loads(result.stdout)
    assert result.exit_code == (1 if whole["problems"] else 0)
    assert whole["versions"]["visavis"] == visavis.__version__
    assert whole["machine"]["usable cores"] >= 1
    assert whole["compiled kernels"]["in use"]
    broken = tmp_path / "site" / "torchvision"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
    monkeypatch.syspath_prepend(str(broken.parent))
    monkeypatch.setenv("PYTHONPATH", str(broken.parent))
    found = run("doctor")
    assert found.exit_code == 1
    assert "operator nms does not exist" in found.stdout


@pytest.mark.usefixtures("without_kernels")
def test_doctor_reports_missing_kernels(run: Run) -> None:
    kernels = json.loads(run("doctor", "--json").stdout)["compiled kernels"]
    assert kernels["in use"] == "none: switched off by VISAVIS_NATIVE=0"
    assert "twice as long" in kernels["cost"] and "install GCC or Clang" in kernels["remedy"]


def leaf_commands() -> dict[str, Any]:
    """Return every command by its full name, those of groups included."""
    found: dict[str, Any] = {}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found |= {f"{name} {one}": inner[one] for one in inner} if inner else {name: command}
    return found


@pytest.mark.parametrize("name", sorted(leaf_commands()))
def test_help_has_indented_examples_of_one_line(
    run: Run, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    result = run(*name.split(), "--help")
    assert result.exit_code == 0
    shown = result.stdout.split("Examples", 1)[1].split("╭", 1)[0]
    lines = [line.rstrip() for line in shown.splitlines() if line.strip()]
    assert lines and any(line.startswith(f"   visavis {name}") for line in lines)
    assert all(line.startswith("   ") and line[3] != " " for line in lines), lines


def test_help_lists_commands_by_use(run: Run) -> None:
    shown = run("--help").stdout
    titles = re.findall(r"^╭─ (\w+) ─", shown, re.MULTILINE)
    assert titles[:4] == ["Options", "Use", "Search", "Train"] and titles[-1] == "Machine"


def test_an_option_has_the_same_short_name_in_every_command() -> None:
    short: dict[str, set[str]] = {}
    for command in leaf_commands().values():
        for option in command.params:
            long = [name for name in option.opts if name.startswith("--")]
            assert long or option.param_type_name == "argument", option.opts
            if long and long[0] != "--top-k":  # of chat, a sampling parameter: -k is for searches
                short.setdefault(long[0], set()).add(" ".join(sorted(set(option.opts) - {long[0]})))
    assert {name: found for name, found in short.items() if len(found) > 1} == {}
    assert short["--output"] == {"-o"} and "--out" not in short


def test_metavars_are_capitals_and_help_is_a_sentence() -> None:
    for name, command in leaf_commands().items():
        for option in command.params:
            shown = option.metavar or ""
            assert re.fullmatch(r"[A-Z|=]*(\|none)?|[a-z]+(\|[a-z]+)+", shown), (name, shown)
            if option.name != "help":
                assert re.search(r"[.)]$", option.help or ""), (name, option.name, option.help)


def test_every_command_that_prints_has_json() -> None:
    group = typer.main.get_command(app)
    commands = dict(group.commands)  # type: ignore[attr-defined]
    for group_name in ("index", "data", "evaluate"):
        inside = commands.pop(group_name).commands
        commands |= {f"{group_name} {name}": command for name, command in inside.items()}
    for name in ("serve", "mcp"):  # print no results
        del commands[name]
    for name, command in commands.items():
        assert any("--json" in option.opts for option in command.params), name


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"visavis {visavis.__version__}\n"


def test_a_reader_that_stops_early_is_no_error(tiny: str) -> None:
    words = [*PROGRAM, "embed", tiny, *["--text", "words"] * 400]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None and child.stderr is not None
    child.stdout.read(10)
    child.stdout.close()
    err = child.stderr.read().decode()
    child.stderr.close()
    assert child.wait() == 141
    assert err == ""


def test_ctrl_c_exits_130_in_one_line(tiny: str, tmp_path: Path) -> None:
    fifo = tmp_path / "items.jsonl"
    os.mkfifo(fifo)  # reading it blocks until somebody writes: the program is surely at work
    command = [*PROGRAM, "embed", tiny, "--items", str(fifo)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with fifo.open("w"):  # opens once the program has opened it too
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert err == "visavis: interrupted\n"


def test_a_search_that_finds_nothing_similar_says_so(run: Run, tiny: str, tmp_path: Path) -> None:
    """Only words are judged: the score of a model that has a calibrated least one."""
    paths = write_pictures(tmp_path / "pictures", 3)
    calibrated = tmp_path / "calibrated"
    shutil.copytree(tiny, calibrated)
    settings = json.loads((calibrated / "visavis.json").read_text())
    settings["profile"]["min_score"] = 0.999
    (calibrated / "visavis.json").write_text(json.dumps(settings))
    run("index", "add", "c.idx", tmp_path / "pictures", "--model", calibrated)
    found = run("index", "search", "c.idx", "words", "-m", calibrated)
    assert "nothing like that: the best score is" in found.stderr and len(found.stdout) > 0
    alike = run("index", "search", "c.idx", "--image", paths[0], "-m", calibrated)
    assert "nothing like that" not in alike.stderr
