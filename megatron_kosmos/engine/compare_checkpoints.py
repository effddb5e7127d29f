"""How two checkpoints differ: settings, tensors that only one has, and how far the weights have moved.

At most two tensors are in memory at a time.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_kosmos.checkpoint.figures import are_identical, difference_norm
from megatron_kosmos.checkpoint.load import StoredTensors
from megatron_kosmos.engine.checkpointing import MODEL_PREFIX
from megatron_kosmos.engine.inspect_checkpoint import CheckpointFigures, Facts, Show, by_part
from megatron_kosmos.engine.resumption import ABSENT, flat


@dataclass(frozen=True)
class Change:
    """How weights differ between two checkpoints: those of a tensor, or of a part."""

    name: str
    is_identical: bool
    """Bit by bit."""
    difference: float | None
    """‖a − b‖, None where an element is not finite."""
    relative: float | None
    """‖a − b‖ / ‖a‖, None where that is not finite either."""

    @classmethod
    def of(cls, name: str, is_identical: bool, difference: float, norm: float) -> "Change":
        """Describe a difference from weights of `norm`, both of which may be NaN."""
        changed = difference / norm if norm else math.inf
        relative = 0.0 if difference == 0 else changed
        return cls(name, is_identical, *(value if math.isfinite(value) else None for value in (difference, relative)))


@dataclass(frozen=True)
class Comparison:
    """How another checkpoint differs from the first."""

    facts: Facts
    """The other's."""
    settings: dict[str, tuple[str, str]]
    """Those that differ, the first's value and the other's."""
    missing: list[str]
    """Tensors that only the first has."""
    left_over: list[str]
    """Tensors that only the other has."""
    misshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """The first's shape and the other's."""
    parts: tuple[Change, ...]
    """Of the weights that both have in one shape."""
    tensors: tuple[Change, ...]
    """The weights, those that changed most first, relative to their norm; from zero is most."""
    moments_identical: bool
    """Whether both have the same tensors beside the weights, bit by bit."""


def compare(
    stored: StoredTensors, figures: CheckpointFigures, other: StoredTensors, facts: Facts, show: Show
) -> Comparison:
    """Compare the checkpoint that `figures` are of with an `other`, whose facts are given."""
    mine, its = stored.shapes, other.shapes
    shared = [name for name in mine if its.get(name) == mine[name]]
    norms = {one.name: math.nan if one.num_nan or one.num_inf else one.norm for one in figures.tensors}
    changes, moments_identical = dict[str, Change](), mine.keys() == its.keys()
    for number, name in enumerate(shared, 1):
        one, another = stored.read(name), other.read(name)
        identical = are_identical(one, another)
        if name.startswith(MODEL_PREFIX):
            difference = 0.0 if identical else difference_norm(one, another)
            changes[name] = Change.of(name, identical, difference, norms[name])
        else:
            moments_identical = moments_identical and identical
        show(f"comparing with {other.folder}", number, len(shared))
    return Comparison(
        facts=facts,
        settings=_differing_settings(figures.facts.config, facts.config),
        missing=sorted(mine.keys() - its.keys()),
        left_over=sorted(its.keys() - mine.keys()),
        misshaped={name: (mine[name], its[name]) for name in mine if name in its and its[name] != mine[name]},
        parts=tuple(
            _part_change(part, [changes[name] for name in names], norms) for part, names in by_part(changes).items()
        ),
        tensors=tuple(sorted(changes.values(), key=_amount, reverse=True)),
        moments_identical=moments_identical,
    )


def _part_change(part: str, changes: list[Change], norms: Mapping[str, float]) -> Change:
    differences = (math.nan if one.difference is None else one.difference for one in changes)
    norm = math.hypot(*(norms[one.name] for one in changes))
    return Change.of(part, all(one.is_identical for one in changes), math.hypot(*differences), norm)


def _amount(change: Change) -> float:
    if change.is_identical:
        return 0.0
    return math.inf if change.relative is None else change.relative


def _differing_settings(mine: Mapping[str, Any], its: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    settings = flat(mine, mine), flat(its, its)
    both = {name: [config.get(name, ABSENT) for config in settings] for name in (settings[0] | settings[1])}
    return {name: (_shown(one), _shown(another)) for name, (one, another) in sorted(both.items()) if one != another}


def _shown(value: object) -> str:
    return "absent" if value is ABSENT else json.dumps(value)


def as_json(figures: CheckpointFigures, comparison: Comparison | None) -> str:
    """Return all of it as JSON, with null for what is no number."""
    document = asdict(figures) | {"not_finite": [one.name for one in figures.not_finite]}
    document["comparison"] = None if comparison is None else asdict(comparison)
    return json.dumps(document, indent=1, allow_nan=False) + "\n"
