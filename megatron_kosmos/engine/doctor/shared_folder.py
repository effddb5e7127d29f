"""The run's folder seen from every node: each leaves a token there and looks for the others'."""

import os
import secrets
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_kosmos.engine.doctor.deadline import within
from megatron_kosmos.engine.doctor.facts import FolderFacts

_TOKENS = ".doctor"
_LOOK_SECONDS = 10.0
"""For a network file system to show another node's file."""


class SharedFolder:
    """The folder that a run writes to, which doesn't have to be there yet."""

    def __init__(self, run_dir: Path, timeout_seconds: float) -> None:
        self._run_dir, self._timeout_seconds = run_dir, timeout_seconds
        self._look_seconds = min(timeout_seconds, _LOOK_SECONDS)
        self._created = list[Path]()

    def leave_token(self, node: int) -> FolderFacts:
        """Write this node's token, and return it with the space that is left."""
        token = f"node-{node}-{secrets.token_hex(8)}"
        try:
            free, held = within(self._timeout_seconds, self._write, token)
            return FolderFacts(free, held, token)
        except (OSError, TimeoutError) as error:
            return FolderFacts(error=f"{self._run_dir}: {error}")

    def unseen(self, tokens: Sequence[str]) -> list[str]:
        """Return those of other nodes' `tokens` that don't show up here."""
        try:
            return within(self._look_seconds + self._timeout_seconds, self._look_for, tokens)
        except (OSError, TimeoutError):
            return list(tokens)

    def clear(self, token: str, with_others: bool) -> None:
        """Take the token away, or all of them with what an interrupted doctor left; then the folders made for them."""
        try:
            within(self._timeout_seconds, self._remove, token, with_others)
        except (OSError, TimeoutError):
            return  # it was told above, and a token is no harm

    def _write(self, token: str) -> tuple[int, int]:
        """Return the free bytes there, and those of checkpoints."""
        for folder in reversed([self._run_dir / _TOKENS, self._run_dir, *self._run_dir.parents]):
            if not folder.exists():
                folder.mkdir(exist_ok=True)
                self._created.insert(0, folder)
        path = self._run_dir / _TOKENS / token
        with path.open("w") as file:
            file.write(token)
            file.flush()
            os.fsync(file.fileno())
        return shutil.disk_usage(self._run_dir).free, _bytes_below(self._run_dir / "checkpoints")

    def _look_for(self, tokens: Sequence[str]) -> list[str]:
        """Open by name: a client of NFS may show an old list of a folder for half a minute."""
        unseen, deadline = list(tokens), time.monotonic() + self._look_seconds
        while True:
            unseen = [token for token in unseen if not self._holds(token)]
            if not unseen or time.monotonic() > deadline:
                return unseen
            time.sleep(0.2)

    def _holds(self, token: str) -> bool:
        try:
            return (self._run_dir / _TOKENS / token).read_text() == token
        except FileNotFoundError:
            return False

    def _remove(self, token: str, with_others: bool) -> None:
        tokens = self._run_dir / _TOKENS
        if with_others:
            shutil.rmtree(tokens, ignore_errors=True)
        else:
            (tokens / token).unlink(missing_ok=True)
        for folder in self._created:
            if not folder.exists():
                continue
            try:
                folder.rmdir()
            except OSError:
                return  # another node still uses it


def _bytes_below(folder: Path) -> int:
    """Return the bytes of all files below `folder`, of which some may be on their way out."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total
