"""What can go wrong with a checkpoint, said the same way on every rank."""

from collections.abc import Sequence
from pathlib import Path


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or does not fit what it is loaded into."""


class SavingFailed(CheckpointError):
    """A checkpoint could not be written while a run went on: a full disk, say. The run would get there again."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint folder is unfinished or its bytes are not those that were written."""

    def __init__(self, folder: Path, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        listed = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"the checkpoint {folder} is damaged or unfinished; use an older one:\n{listed}")
