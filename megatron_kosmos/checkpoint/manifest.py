"""The manifest of a checkpoint folder: which files belong to it, with their sizes and checksums, and what they hold."""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Self

from pydantic import NonNegativeInt

from megatron_kosmos.checkpoint.errors import DamagedCheckpointError
from megatron_kosmos.checkpoint.folders import write_durably
from megatron_kosmos.checkpoint.mesh import CheckpointMesh
from megatron_kosmos.config.base import StrictModel

MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"

_NUM_READERS = 2
"""Files that a rank reads at a time: one core takes a checksum more slowly than a disk gives the bytes."""

Show = Callable[[int, int], None]
"""Takes how many bytes are done, and of how many."""


class FileRecord(StrictModel):
    """What a file was when it was written."""

    num_bytes: NonNegativeInt
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Self:
        """Read the whole file and return its record."""
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256")
            return cls(num_bytes=stream.tell(), sha256=digest.hexdigest())


class TensorRecord(StrictModel):
    """A whole tensor's shape and torch dtype, such as "float32"."""

    shape: tuple[NonNegativeInt, ...]
    dtype: str


class Manifest(StrictModel):
    """Everything needed to tell whether a checkpoint is whole, and what can be loaded from it."""

    format_version: Literal[1] = 1
    step: NonNegativeInt
    files: dict[str, FileRecord]
    tensors: dict[str, TensorRecord]

    def write(self, folder: Path) -> None:
        """Write the manifest with its own checksum, durably."""
        content = self.model_dump(mode="json")
        document = {"sha256": _checksum(content), "content": content}
        write_durably(folder / MANIFEST_FILE, json.dumps(document, indent=1))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return the manifest of a folder. Raises DamagedCheckpointError if it is missing or not as written."""
        try:
            document = json.loads((folder / MANIFEST_FILE).read_text("utf-8"))
            if document["sha256"] != _checksum(document["content"]):
                raise ValueError("its checksum differs")
            return cls.model_validate(document["content"])
        except FileNotFoundError:
            raise DamagedCheckpointError(folder, [f"{MANIFEST_FILE} is missing: the save did not finish"]) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedCheckpointError(folder, [f"{MANIFEST_FILE} cannot be trusted: {error}"]) from error


def is_of_training(folder: Path) -> bool:
    """Whether `folder` is a run, a folder of checkpoints or one of them, whole or not."""
    patterns = ("config.yaml", MANIFEST_FILE, f"step_*/{MANIFEST_FILE}", f"checkpoints/step_*/{MANIFEST_FILE}")
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)


def verify(folder: Path, mesh: CheckpointMesh, *, contents: bool = True, show: Show | None = None) -> Manifest:
    """Check every file's size and checksum and return the manifest (a collective: the ranks share the hashing).

    Without `contents` only the sizes are checked, and the manifest's own checksum. `show` is told after each file.
    Raises DamagedCheckpointError, with the same text on every rank, if a file is missing, left over, or not as written.
    """
    manifest: Manifest | None = None
    try:
        manifest = Manifest.read(folder)
        problems = _find_problems(folder, manifest, mesh, contents, show)
    except DamagedCheckpointError as error:
        problems = error.problems
    found = sorted({problem for of_rank in mesh.gather(problems) for problem in of_rank})
    if manifest is None or found:
        raise DamagedCheckpointError(folder, found)
    return manifest


def verify_file(folder: Path, manifest: Manifest, name: str) -> None:
    """Check one file's size and checksum. Raises DamagedCheckpointError."""
    problem = _file_problem(folder, name, manifest.files[name], check_content=True)
    if problem:
        raise DamagedCheckpointError(folder, [problem])


def _find_problems(
    folder: Path, manifest: Manifest, mesh: CheckpointMesh, contents: bool, show: Show | None
) -> list[str]:
    # torch's reader takes every safetensors file it finds, so one that does not belong is as bad as a missing one.
    present = {path.name for path in folder.glob("*.safetensors")}
    problems = [f"{name} does not belong to it" for name in present - manifest.files.keys()]
    largest_first = sorted(manifest.files, key=lambda name: (-manifest.files[name].num_bytes, name))
    mine = largest_first[mesh.rank :: mesh.size] if contents else []

    def check(name: str) -> str | None:
        return _file_problem(folder, name, manifest.files[name], check_content=name in mine)

    done, total = 0, sum(record.num_bytes for record in manifest.files.values())
    with ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="verifying") as readers:
        for name, problem in zip(largest_first, readers.map(check, largest_first), strict=True):
            problems += [problem] if problem else []
            done += manifest.files[name].num_bytes
            if show is not None:
                show(done, total)
    return problems


def _file_problem(folder: Path, name: str, record: FileRecord, check_content: bool) -> str | None:
    path = folder / name
    try:
        num_bytes = path.stat().st_size
        if num_bytes != record.num_bytes:
            return f"{name} has {num_bytes} bytes instead of {record.num_bytes}"
        if check_content and FileRecord.of(path) != record:
            return f"{name} has its size but not its sha256 checksum"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error}"
    return None


def _checksum(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
