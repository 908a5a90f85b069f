"""Tensors of safetensors and torch files, read one by one where they lie."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from visavis.checkpoints.tensor_files import DTYPES, check_values, read_headers, read_tensors
from visavis.errors import CheckpointError, CheckpointWarning


def tensors() -> dict[str, torch.Tensor]:
    whole = torch.arange(120.0).reshape(4, 30)
    return {
        "plain": torch.randn(3, 5),
        "half": torch.randn(7).bfloat16(),
        "transposed": whole.T,
        "a part": whole[1:3, 10:20],
        "the same again": whole,
        "repeated": torch.arange(3.0)[:, None].expand(3, 4),
        "scalar": torch.tensor(2.5),
        "nothing": torch.empty(0, 3),
        "numbers": torch.arange(9, dtype=torch.int64),
        "truth": torch.tensor([True, False]),
    }


def test_a_torch_file_gives_what_torch_gives(tmp_path: Path) -> None:
    """Views of one storage, transposed and repeated tensors among them."""
    path = tmp_path / "weights.bin"
    torch.save(tensors(), path)
    expected = torch.load(path, weights_only=True)
    found = read_tensors([path])
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].is_contiguous()
        assert torch.equal(found[name], tensor), name
        assert found.entries[name].shape == tensor.shape


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_type_of_safetensors(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    save_file({"a": tensor, "empty": tensor[:0]}, tmp_path / "a.safetensors")
    found = read_tensors([tmp_path / "a.safetensors"])
    assert found["a"].dtype == dtype and torch.equal(found["a"].float(), tensor.float())
    assert found["empty"].shape == (0, 4)


def test_a_torch_file_that_another_program_packed(tmp_path: Path) -> None:
    """Its numbers are not where PyTorch computes them to be."""
    torch.save(tensors(), tmp_path / "a.bin")
    with (
        zipfile.ZipFile(tmp_path / "a.bin") as a,
        zipfile.ZipFile(tmp_path / "b.bin", "w") as b,
    ):
        for entry in a.infolist():
            b.writestr(entry.filename, a.read(entry))
    with pytest.raises(CheckpointError, match="not where PyTorch puts it"):
        read_headers([tmp_path / "b.bin"])


def test_big_endian_numbers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    torch.save({"a": torch.ones(2)}, path)
    content = path.read_bytes()
    assert content.count(b"little") == 1
    path.write_bytes(content.replace(b"little", b"big   "))
    with pytest.raises(CheckpointError, match=r"cannot read .*a\.bin"):
        read_headers([path])


@pytest.mark.parametrize("name", ["a.bin", "a.safetensors"])
def test_a_file_that_shrinks_while_it_is_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    save = torch.save if name.endswith("bin") else save_file
    save({"a": torch.ones(5000)}, path)
    found = read_tensors([path])
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="changed while it was read"):
        found["a"]
    path.unlink()
    with pytest.raises(CheckpointError, match="changed while it was read"):
        found["a"]


@pytest.mark.parametrize("at", [0, 40_000, 99_999])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_none_is_found(at: int, value: float) -> None:
    weights = torch.full((100_000,), 60_000.0)
    check_values("a", weights, "here")
    check_values("a", weights.half(), "here")  # its sum is beyond float16
    weights[at] = value
    for tensor in (weights, weights.bfloat16(), weights.reshape(100, 1000).T):
        with pytest.warns(CheckpointWarning, match="a of here holds NaN or infinite values"):
            check_values("a", tensor, "here")
