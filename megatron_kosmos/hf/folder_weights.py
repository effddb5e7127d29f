"""The weights of a Hugging Face folder: their names and shapes at once, each tensor when it is asked for."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_kosmos.hf.shards import INDEX_FILE, SINGLE_FILE
from megatron_kosmos.tensor_file import read_ahead

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class FolderError(ValueError):
    """A folder that is no model of transformers, or not a readable one; the message says what to do."""


class FolderWeights:
    """The safetensors files of a folder that transformers' `save_pretrained` or an export wrote.

    Raises FolderError where there are none, or one is missing or damaged. Pickled weights are never read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Each tensor's shape by its name."""
        self.dtypes: dict[str, str] = {}
        """What safetensors calls each tensor's dtype."""
        self._files: dict[str, Path] = {}
        self._begun: set[Path] = set()
        """Files that a tensor was read of."""
        for path in _weight_files(folder):
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 - not a mapping
                        if name in self._files:
                            others = f"{self._files[name].name} and in {path.name}"
                            raise FolderError(f"{name} is in {others} of {folder}: remove the file that is out of date")
                        stored = file.get_slice(name)
                        self.shapes[name], self.dtypes[name] = tuple(stored.get_shape()), stored.get_dtype()
                        self._files[name] = path
            except (OSError, SafetensorError) as error:
                raise FolderError(f"{path} cannot be read: {error}") from error

    def read(self, name: str) -> Tensor:
        """Return the tensor `name`, one of `shapes`, on the CPU. It may lie in the file: don't change it in place."""
        path = self._files[name]
        if path not in self._begun:
            read_ahead(path)
            self._begun.add(path)
        # A file stays mapped, and what was read of it in memory, while it is open: so each time anew.
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if index.is_file():
        if (folder / SINGLE_FILE).is_file():
            raise FolderError(f"{folder} has both {SINGLE_FILE} and {INDEX_FILE}: remove what is out of date")
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            missing = [name for name in names if not (folder / name).is_file()]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise FolderError(f"{index} is not an index of safetensors files: {error}") from error
        if missing:
            raise FolderError(f"{folder} lacks {', '.join(missing)}, which its {INDEX_FILE} names; copy them there")
        return [folder / name for name in names]
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    pickled = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickled:
        raise FolderError(
            f"{folder} has its weights in {', '.join(pickled)}: pickled files can run any code when they are read, so "
            f"they are not. Save them as safetensors where you trust them: transformers' save_pretrained does"
        )
    raise FolderError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}")
