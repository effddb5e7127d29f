"""Streaming safetensors: tensors go to numbered files as they come, with transformers' index beside them."""

import json
from pathlib import Path

from torch import Tensor

from megatron_kosmos.tensor_file import write_tensor_file

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


class ShardWriter:
    """Writes tensors to `folder`, holding at most one file's worth of them in memory.

    A tensor larger than `max_shard_bytes` gets a file of its own. Call `close` after the last tensor.
    """

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        self.folder, self.max_shard_bytes = folder, max_shard_bytes
        self.num_parameters = 0
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._written: list[list[str]] = []
        """Names of the tensors of each file."""

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor, which must stay as it is until a later call has written it."""
        if self._pending and self._pending_bytes + tensor.nbytes > self.max_shard_bytes:
            self._flush()
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += tensor.nbytes
        self.num_parameters += tensor.numel()

    def close(self) -> None:
        """Write what is left, give the files their final names and write the index where there are several."""
        self._flush()
        if len(self._written) == 1:
            self._temporary(0).rename(self.folder / SINGLE_FILE)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._written):
            file = f"model-{number + 1:05d}-of-{len(self._written):05d}.safetensors"
            self._temporary(number).rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {
            "metadata": {"total_size": self._total_bytes, "total_parameters": self.num_parameters},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        write_tensor_file(self._temporary(len(self._written)), self._pending, {"format": "pt"})
        self._written.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _temporary(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.writing"
