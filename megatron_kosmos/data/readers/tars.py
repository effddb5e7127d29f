"""The reader of webdataset tars: members that share a key form a sample. Nothing is ever extracted to disk."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_kosmos.data.readers.records import MAX_RECORD_BYTES, DamagedFile, RawRecord, Sample, Unreadable, too_large

END_MARK = bytes(2 * tarfile.BLOCKSIZE)


def read_tar(file: Path) -> Iterator[RawRecord]:
    """Yield the samples of `file` in order. Raises DamagedFile when it is damaged or repeats a name."""
    from webdataset.tariterators import group_by_keys  # here, since webdataset imports torch

    key = "the first sample"
    with file.open("rb") as stream:
        try:
            for sample in group_by_keys(_members(stream)):
                key = sample["__key__"]
                members = {name: data for name, data in sample.items() if not name.startswith("__")}
                unreadable = next((data for data in members.values() if isinstance(data, Unreadable)), None)
                yield RawRecord(file, key, unreadable or Sample(key, members), stream.tell())
        except (tarfile.TarError, ValueError, OSError) as error:
            detail = error.args[0] if error.args else error
            raise DamagedFile(file, key, f"the tar cannot be read after this: {detail}") from error


def _members(stream: BinaryIO) -> Iterator[dict[str, Any]]:
    """Yield the files in a tar as webdataset's grouping wants them: links, folders and its own notes left out."""
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # else it keeps them all
            if not member.isreg() or (member.name.startswith("__") and member.name.endswith("__")):
                continue
            data: bytes | Unreadable
            if member.size > MAX_RECORD_BYTES:
                data = too_large(member.size, MAX_RECORD_BYTES, member.name)
            else:
                content = tar.extractfile(member)
                data = content.read() if content is not None else b""
            yield {"fname": member.name, "data": data, "__url__": ""}
        # tarfile takes a header that is cut or damaged for the end.
        stream.seek(tar.offset)
        if stream.read(len(END_MARK)) != END_MARK:
            raise tarfile.ReadError(
                f"truncated or damaged: at byte {tar.offset} there is neither a member nor the end-of-archive mark;"
                " get the file again"
            )
