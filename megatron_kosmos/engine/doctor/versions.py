"""Versions of what a node trains with, read without loading it."""

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement

import megatron_kosmos

PACKAGE = "megatron-kosmos"
_OPTIONAL = ("flash-attn", "transformer-engine", "apex", "bitsandbytes")
_DRIVER = Path("/proc/driver/nvidia/version")


def versions_here() -> dict[str, str]:
    """Return the versions of Python, this package, the driver, and every library that this package needs or can use.

    What is absent is left out. `code` is a digest of this package's files: nodes with clones of their own may differ.
    """
    found = {"python": platform.python_version(), PACKAGE: megatron_kosmos.__version__, "code": _code_digest()}
    for name in [*(one.name for one in _requirements()), *_OPTIONAL]:
        if (installed := _installed(name)) is not None:
            found[name] = installed
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    if _DRIVER.exists():
        # NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue …
        words = _DRIVER.read_text().splitlines()[0].split()
        found["driver"] = next((word for word in words if word[0].isdigit()), "unknown")
    return found


def unfit_here() -> tuple[str, ...]:
    """Return the libraries that are absent or outside this package's range, with what is needed.

    Empty where this package runs from a folder without having been installed: it doesn't know its ranges then.
    """
    unfit = []
    for needed in _requirements():
        installed = _installed(needed.name)
        if installed is None or not needed.specifier.contains(installed, prereleases=True):
            unfit.append(f"{needed.name} {installed or 'is absent'} (needed: {needed.specifier})")
    return tuple(unfit)


def _requirements() -> list[Requirement]:
    """Return what this package always needs."""
    try:
        lines = requires(PACKAGE) or []
    except PackageNotFoundError:
        return []
    needed = [Requirement(line) for line in lines]
    return [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _code_digest() -> str:
    root = Path(megatron_kosmos.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
