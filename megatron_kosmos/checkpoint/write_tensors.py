"""Writing a checkpoint tensor by tensor in one process: what conversions make, whose weights never are in memory whole.

The folder is the same as `save.save_checkpoint` writes from the ranks of a run: safetensors files that say where each
part lies, the state and the manifest. It is not renamed here: whoever converts puts all of a run in place at once.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from megatron_kosmos.checkpoint.folders import sync_folder, write_durably
from megatron_kosmos.checkpoint.manifest import STATE_FILE, FileRecord, Manifest, TensorRecord
from megatron_kosmos.checkpoint.part_file import write_part_file
from megatron_kosmos.checkpoint.tensors import JSON


class TensorWriter:
    """Writes whole tensors to the new checkpoint `folder`, holding at most one file's worth of them in memory.

    A tensor larger than `max_file_bytes` gets a file of its own. Call `close` after the last tensor.
    """

    def __init__(self, folder: Path, max_file_bytes: int) -> None:
        self.folder, self.max_file_bytes = folder, max_file_bytes
        self._pending: dict[str, Tensor] = {}
        self._records: dict[str, TensorRecord] = {}
        self._files: dict[str, FileRecord] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a contiguous tensor, which must stay as it is until a later call has written it."""
        waiting = sum(one.nbytes for one in self._pending.values())
        if self._pending and waiting + tensor.nbytes > self.max_file_bytes:
            self._flush()
        self._pending[name] = tensor
        self._records[name] = TensorRecord(shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))

    def close(self, step: int, state: Mapping[str, JSON]) -> None:
        """Write what is left, the state and, last, the manifest."""
        self._flush()
        write_durably(self.folder / STATE_FILE, json.dumps(state, indent=1, allow_nan=False))
        files = {**self._files, STATE_FILE: FileRecord.of(self.folder / STATE_FILE)}
        Manifest(step=step, files=files, tensors=dict(sorted(self._records.items()))).write(self.folder)
        sync_folder(self.folder)

    def _flush(self) -> None:
        offsets = {name: [0] * tensor.dim() for name, tensor in self._pending.items()}
        name = f"part-{len(self._files) + 1:05d}.safetensors"
        self._files[name] = write_part_file(self.folder / name, self._pending, offsets)
        self._pending = {}
