"""A file of a checkpoint that holds parts of tensors and says where each lies in its whole."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from megatron_kosmos.checkpoint.manifest import FileRecord
from megatron_kosmos.checkpoint.tensors import SHARDING
from megatron_kosmos.tensor_file import write_tensor_file


def write_part_file(path: Path, parts: Mapping[str, Tensor], offsets: Mapping[str, Sequence[int]]) -> FileRecord:
    """Write contiguous CPU `parts` to a new file, durably, and return its record; `offsets` says where each begins.

    The checksum is of what was to be written, so it tells of a disk that kept something else. Raises OSError.
    """
    places = {name: {"saved_offsets": list(offsets[name])} for name in parts}
    # The keys are those of torch's HuggingFaceStorageWriter.
    metadata = {SHARDING: json.dumps(places), "DCP_VERSION": "1.0", "format": "pt"}
    content_hash = hashlib.sha256()
    num_bytes = write_tensor_file(path, parts, metadata, content_hash)
    return FileRecord(num_bytes=num_bytes, sha256=content_hash.hexdigest())
