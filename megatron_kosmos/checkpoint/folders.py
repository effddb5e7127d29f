"""The names of checkpoint folders, and file operations that survive a kill or a power cut."""

import os
import re
from pathlib import Path

_COMPLETE = re.compile(r"step_(\d{8,})")
_LEFTOVER = re.compile(r"\.step_\d{8,}\.(writing|removing)")

CHECKPOINTS = "checkpoints"
"""Folder of a run that holds its checkpoints."""

LATEST_FILE = "latest"
"""Holds the name of the folder that was finished last."""


def complete_folder(root: Path, step: int) -> Path:
    """Return the folder of a finished checkpoint."""
    return root / f"step_{step:08d}"


def writing_folder(root: Path, step: int) -> Path:
    """Return the folder that a checkpoint is written to before it gets its name."""
    return root / f".step_{step:08d}.writing"


def finished_steps(root: Path) -> list[int]:
    """Return the steps whose folders bear a finished checkpoint's name, newest first."""
    matches = [_COMPLETE.fullmatch(path.name) for path in root.iterdir()] if root.is_dir() else []
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def leftovers(root: Path) -> list[Path]:
    """Return the folders that a killed save or removal left behind."""
    return [path for path in root.iterdir() if _LEFTOVER.fullmatch(path.name)] if root.is_dir() else []


def set_aside(folder: Path) -> Path:
    """Rename a finished checkpoint to a leftover's name, so that a kill amid its removal leaves no half."""
    doomed = folder.with_name(f".{folder.name}.removing")
    folder.rename(doomed)
    return doomed


def point_to(folder: Path) -> None:
    """Write the name of a finished checkpoint into `latest` beside it, for people and other tools."""
    pointer = folder.with_name(LATEST_FILE)
    unfinished = folder.with_name(f".{LATEST_FILE}.writing")
    write_durably(unfinished, f"{folder.name}\n")
    unfinished.rename(pointer)
    sync_folder(folder.parent)


def write_durably(path: Path, text: str) -> None:
    """Write a file so that it survives a power cut once this returns (its folder must be synced too)."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Make a folder's entries (files made, removed, renamed in it) survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
