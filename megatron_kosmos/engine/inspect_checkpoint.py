"""What a checkpoint holds: its facts, parts and tensors, read one tensor at a time in one process.

At most two tensors are in memory at a time, and 8 MiB pieces of them in float64.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megatron_kosmos.checkpoint.errors import CheckpointError, DamagedCheckpointError
from megatron_kosmos.checkpoint.figures import (
    TensorFigures,
    tensor_figures,
    update_squares,
)
from megatron_kosmos.checkpoint.folders import CHECKPOINTS, complete_folder, finished_steps
from megatron_kosmos.checkpoint.load import StoredTensors, read_state
from megatron_kosmos.checkpoint.manifest import MANIFEST_FILE, STATE_FILE
from megatron_kosmos.engine.checkpointing import MODEL_PREFIX, OPTIMIZER_PREFIX
from megatron_kosmos.engine.trainable import PARTS, part_of
from megatron_kosmos.optim.adamw import MOMENTS

logger = logging.getLogger(__name__)

Show = Callable[[str, int, int], None]
"""Takes what is being done, how much of it is done, and of how much."""

OTHER_PART = "other"
"""Part of tensors that are neither weights nor moments of weights."""


@dataclass(frozen=True)
class Facts:
    """What a checkpoint says of itself; None where it doesn't."""

    folder: str
    step: int
    updates: int | None
    version: str | None
    """Of the code that saved it."""
    data: str | None
    """Fingerprint of the training data."""
    config: Mapping[str, Any]
    """Of the run that saved it."""
    num_files: int
    num_bytes: int
    """Of all files."""
    checksums_verified: bool
    """False: only the files' sizes were compared with the manifest's."""


@dataclass(frozen=True)
class PartFigures:
    """The weights of one part and their moments."""

    part: str
    num_elements: int
    """Of the weights."""
    trained: int | None
    """Elements that have moments; None where the whole checkpoint has none, as one from before the first step."""
    frozen: int | None
    """The rest; None as above."""
    weight_bytes: int
    moment_bytes: int
    weight_norm: float
    largest_weight: float
    """Absolute value."""
    exp_avg_norm: float | None
    """None without moments, as the two that follow."""
    exp_avg_sq_norm: float | None
    update_rms: float | None
    """Root mean square of exp_avg / √exp_avg_sq, over the elements that have had a gradient."""


@dataclass(frozen=True)
class CheckpointFigures:
    """All that is told of one checkpoint."""

    facts: Facts
    parts: tuple[PartFigures, ...]
    tensors: tuple[TensorFigures, ...]

    @property
    def not_finite(self) -> list[TensorFigures]:
        """The tensors with a NaN or an infinity."""
        return [one for one in self.tensors if one.num_nan or one.num_inf]


def open_checkpoint(source: Path, contents: bool, show: Show = lambda *_: None) -> StoredTensors:
    """Open a checkpoint's folder, or the newest whole one of a run's, after a check of its files.

    `contents`: check what is in them, not their sizes only. Raises CheckpointError where there is none, or
    DamagedCheckpointError where `source` is a checkpoint itself and not whole; older ones of a run are fallen back to,
    with a warning.
    """

    def opened(folder: Path) -> StoredTensors:
        doing = f"checking {folder}"
        return StoredTensors(folder, contents=contents, show=lambda done, total: show(doing, done, total))

    if any((source / name).is_file() for name in (MANIFEST_FILE, STATE_FILE)):
        return opened(source)
    root = source / CHECKPOINTS if (source / CHECKPOINTS).is_dir() else source
    for step in finished_steps(root):
        try:
            return opened(complete_folder(root, step))
        except DamagedCheckpointError as error:
            logger.warning("passing over %s", error)
    raise CheckpointError(f"no whole checkpoint at {source}; give a run's folder or one of its checkpoints/step_*")


def read_facts(stored: StoredTensors, checksums_verified: bool) -> Facts:
    """Return what a checkpoint says of itself. Raises DamagedCheckpointError."""
    state: dict[str, Any] = read_state(stored.folder)
    files = stored.manifest.files
    return Facts(
        folder=str(stored.folder),
        step=stored.manifest.step,
        updates=state.get("updates"),
        version=state.get("version"),
        data=state.get("data"),
        config=state.get("config") or {},
        num_files=len(files),
        num_bytes=sum(record.num_bytes for record in files.values()),
        checksums_verified=checksums_verified,
    )


def matching(stored: StoredTensors, pattern: str) -> list[str]:
    """Return the tensors that `pattern` names, with * and ? as in a shell; weights by their global names, too.

    Raises CheckpointError where it names none.
    """
    found = [
        name
        for name in stored.shapes
        if fnmatchcase(name, pattern) or fnmatchcase(name.removeprefix(MODEL_PREFIX), pattern)
    ]
    if not found:
        close = get_close_matches(pattern, stored.shapes, n=3, cutoff=0.3) or list(stored.shapes)[:3]
        raise CheckpointError(f"no tensor of {stored.folder} matches {pattern!r}; there are {', '.join(close)}, ...")
    return found


def measure(stored: StoredTensors, facts: Facts, show: Show) -> CheckpointFigures:
    """Read every tensor once (second moments twice) and return its figures and those of the parts."""
    updates: dict[str, tuple[float, int]] = {}
    figures = {}
    names = list(stored.shapes)
    for number, name in enumerate(names, 1):
        tensor = stored.read(name)
        figures[name] = tensor_figures(name, tensor)
        second = name.removesuffix(MOMENTS[0]) + MOMENTS[1]
        if name.endswith(f"/{MOMENTS[0]}") and stored.shapes.get(second) == tuple(tensor.shape):
            updates[_weight_of(name)] = update_squares(tensor, stored.read(second))
        show(f"measuring {stored.folder}", number, len(names))
    return CheckpointFigures(facts, tuple(_part_figures(figures, updates)), tuple(figures.values()))


def _part_figures(
    figures: Mapping[str, TensorFigures], updates: Mapping[str, tuple[float, int]]
) -> Iterator[PartFigures]:
    has_moments = any(name.endswith(f"/{MOMENTS[0]}") for name in figures)
    for part, names in by_part(figures).items():
        weights = [figures[name] for name in names if name.startswith(MODEL_PREFIX)]
        first, second = ([figures[name] for name in names if name.endswith(f"/{key}")] for key in MOMENTS)
        with_moments = {_weight_of(one.name) for one in first}
        trained = sum(one.num_elements for one in weights if _weight_of(one.name) in with_moments)
        num_elements = sum(one.num_elements for one in weights)
        squares, count = (sum(updates.get(name, (0.0, 0))[index] for name in with_moments) for index in (0, 1))
        yield PartFigures(
            part=part,
            num_elements=num_elements,
            trained=trained if has_moments else None,
            frozen=num_elements - trained if has_moments else None,
            weight_bytes=sum(one.num_bytes for one in weights),
            moment_bytes=sum(figures[name].num_bytes for name in names) - sum(one.num_bytes for one in weights),
            weight_norm=math.hypot(*(one.norm for one in weights)),
            largest_weight=max((one.max_abs for one in weights), default=0.0),
            exp_avg_norm=math.hypot(*(one.norm for one in first)) if first else None,
            exp_avg_sq_norm=math.hypot(*(one.norm for one in second)) if second else None,
            update_rms=math.sqrt(squares / count) if count else None,
        )


def _weight_of(name: str) -> str:
    """Return the global name of the weight that a tensor is, or is a moment of."""
    if name.startswith(MODEL_PREFIX):
        return name.removeprefix(MODEL_PREFIX)
    return name.removeprefix(OPTIMIZER_PREFIX).rpartition("/")[0]


def by_part(names: Mapping[str, object]) -> dict[str, list[str]]:
    """Sort tensors into the parts of the model, in the order of PARTS."""
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for name in names:
        is_known = name.startswith(MODEL_PREFIX) or name.rpartition("/")[2] in MOMENTS
        parts.setdefault(part_of(_weight_of(name)) if is_known else OTHER_PART, []).append(name)
    return {part: of_part for part, of_part in parts.items() if of_part}
