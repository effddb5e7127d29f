"""Tensor files: what the library reads back, their hash and mode, and file systems that refuse direct writes."""

import errno
import fcntl
import hashlib
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from megatron_kosmos.tensor_file import write_tensor_file

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.bfloat16,
    torch.float16,
    torch.int16,
    torch.int32,
    torch.float32,
    torch.int64,
    torch.float64,
)
MEBIBYTE = 1 << 20


def some_tensors() -> dict[str, Tensor]:
    """One of each dtype with an odd number of elements, narrow ones first, and the odd shapes."""
    each = {f"of {dtype}": torch.arange(7).to(dtype) for dtype in DTYPES}
    return {**each, "no dims": torch.tensor(2**53 + 1), "empty": torch.ones(0, 3), "ä": torch.ones(2, 1, 3)}


@pytest.mark.parametrize("num_large_bytes", [0, 8 * MEBIBYTE, 17 * MEBIBYTE + 3])
def test_the_library_reads_what_was_written(num_large_bytes: int, tmp_path: Path) -> None:
    tensors = some_tensors()
    if num_large_bytes:
        tensors["large"] = torch.randint(256, (num_large_bytes,), dtype=torch.uint8)
    content_hash = hashlib.sha256()
    path = tmp_path / "some.safetensors"
    num_bytes = write_tensor_file(path, tensors, {"format": "pt", "a": "b"}, content_hash)
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name
        assert read[name].data_ptr() % tensor.element_size() == 0
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "a": "b"}
    content = path.read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (num_bytes, content_hash.hexdigest())


def test_the_umask_says_who_may_read(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_tensor_file(tmp_path / "file", some_tensors(), {})
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("refuses", ["open", "write"])
def test_a_file_system_without_direct_writes_gets_the_same_file(
    refuses: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"large": torch.randn(3 * MEBIBYTE), **some_tensors()}
    write_tensor_file(tmp_path / "direct", tensors, {})
    call: Callable[..., int] = getattr(os, refuses)
    refused = []

    def refusing(*arguments: int) -> int:
        is_direct = os.O_DIRECT & (arguments[1] if refuses == "open" else fcntl.fcntl(arguments[0], fcntl.F_GETFL))
        if is_direct:
            refused.append(arguments)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return call(*arguments)

    monkeypatch.setattr(os, refuses, refusing)
    write_tensor_file(tmp_path / "through the cache", tensors, {})
    monkeypatch.undo()
    assert len(refused) == 1
    assert (tmp_path / "through the cache").read_bytes() == (tmp_path / "direct").read_bytes()


@pytest.mark.parametrize("limit", [100, 9 * MEBIBYTE])
def test_a_full_disk_is_told_with_the_path(limit: int, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*/full"):
            write_tensor_file(tmp_path / "full", {"large": torch.zeros(3 * MEBIBYTE)}, {}, hashlib.sha256())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "full").stat().st_size <= limit
