"""A safetensors file, written from where its tensors lie to the disk, without the page cache between.

Copies into that cache and its writing back take processor time and memory bandwidth from whatever computes beside them,
and are what a large write spends most of its time on. The library's own writer goes through it, and leaves files that
their owner alone can read.
"""

import errno
import fcntl
import json
import mmap
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

_PIECE = 8 << 20
"""Bytes that are written at once: a multiple of every device's blocks."""
_ALIGNMENT = 8
"""Bytes: the widest element. Tensors begin at multiples of their element's width."""
_DIRECT = getattr(os, "O_DIRECT", 0)
"""Past the page cache; 0 where the system knows no such thing."""

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The format's names."""


class Hash(Protocol):
    """What hashlib makes."""

    def update(self, data: memoryview, /) -> None:
        """Take in further bytes."""


def write_tensor_file(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], content_hash: Hash | None = None
) -> int:
    """Write contiguous CPU tensors to a new file, durably (its folder must be synced too); return the file's bytes.

    Other threads run on meanwhile. `content_hash` takes in every byte on the way. The file has the mode that the user's
    umask gives. Source of the format: https://huggingface.co/docs/safetensors. Raises OSError, with the path.
    """
    widest_first = sorted(tensors, key=lambda name: -tensors[name].element_size())
    with _Pieces(path, content_hash) as pieces:
        pieces.add(np.frombuffer(_header({name: tensors[name] for name in widest_first}, metadata), dtype=np.uint8))
        for name in widest_first:
            pieces.add(tensors[name].detach().reshape(-1).view(torch.uint8).numpy())
    return pieces.num_bytes


def read_ahead(path: Path) -> None:
    """Let the system read a file in the background, which takes a quarter of the time that page by page takes.

    Page by page is how tensors are read that lie in a mapped file. Raises OSError.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    with path.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    fields: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.nbytes
        fields[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(fields).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


class _Pieces:
    """A file on its way: one piece is gathered while the one before is hashed and written, each by a thread.

    A piece's memory begins at a page, as direct writes need it.
    """

    def __init__(self, path: Path, content_hash: Hash | None) -> None:
        self.path, self.content_hash = path, content_hash
        self.num_bytes = 0
        self._gathered = 0
        self._memory, self._other = mmap.mmap(-1, _PIECE), mmap.mmap(-1, _PIECE)
        self._under_way: list[Future[None]] = []
        """Of the piece before, whose memory is the other."""

    def __enter__(self) -> Self:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self._file = os.open(self.path, flags | _DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:  # what a file system says that has no direct writes
                raise
            self._file = os.open(self.path, flags, 0o666)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="tensor-file")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is None:
                self._flush()
                self._finish()
                os.fsync(self._file)
        finally:
            self._threads.shutdown()
            os.close(self._file)

    def add(self, content: "np.ndarray[Any, np.dtype[np.uint8]]") -> None:
        """Append bytes. numpy copies them in one thread, and lets others run."""
        done = 0
        while done < len(content):
            count = min(len(content) - done, _PIECE - self._gathered)
            place = np.frombuffer(self._memory, dtype=np.uint8, count=count, offset=self._gathered)
            place[:] = content[done : done + count]
            self._gathered += count
            done += count
            if self._gathered == _PIECE:
                self._flush()

    def _flush(self) -> None:
        self._finish()
        piece = memoryview(self._memory)[: self._gathered]
        self._under_way = [self._threads.submit(self._write, piece)]
        if self.content_hash is not None:
            self._under_way.append(self._threads.submit(self.content_hash.update, piece))
        self.num_bytes += self._gathered
        self._memory, self._other, self._gathered = self._other, self._memory, 0

    def _finish(self) -> None:
        """Wait for what is under way. Raises OSError if it failed."""
        wait(self._under_way)
        for one in self._under_way:
            one.result()

    def _write(self, piece: memoryview) -> None:
        while piece:
            try:
                piece = piece[os.write(self._file, piece) :]
            except OSError as error:
                flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
                if error.errno != errno.EINVAL or not flags & _DIRECT:
                    raise OSError(error.errno, error.strerror, str(self.path)) from error
                # No whole blocks, as the last piece, or no direct writes here at all: through the page cache, then.
                fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~_DIRECT)
