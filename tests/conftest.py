"""What every test may use: real weights, a private cache, the data beside some checkouts.

Set here, before anything imports torch: one thread (tiny models are fastest on one, and two test
runs then do not fight) and no hub access. Knows nothing of models; fakes live in tests/fakes.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from visavis.checkpoints import bundled
from visavis.native import library

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Machines differ: how long an example takes says nothing about whether it is right.
settings.register_profile("visavis", deadline=None)
settings.load_profile("visavis")

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def nano_files() -> dict[str, Path]:
    """The real SmolLM2 and EfficientNet-Lite2 weights, fetched once into the user's cache."""
    return bundled.fetch("nano", progress=False)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder that VISAVIS_CACHE names for the length of one test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("VISAVIS_CACHE", str(folder))
    return folder


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The compiled kernels are switched off: PyTorch's operations do everything."""
    monkeypatch.setenv(library.VARIABLE, "0")
    library.find.cache_clear()
    yield
    monkeypatch.undo()
    library.find.cache_clear()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of training and evaluation data beside some checkouts; skips without it."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not (folder / "README.md").is_file():
        pytest.skip("needs the data folder ../shared/data, which is not beside this checkout")
    return folder
