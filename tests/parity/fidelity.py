"""The figures of docs/fidelity.md: every comparison with an oracle is measured, written down and held to its bound in
one call, so that the table shows what the tests saw.
"""

import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
LIBRARIES = ("torch", "transformers", "torchscale", "flamingo-pytorch", "megatron-core")
SMALLEST = 1e-4
"""Size of a tensor below which there is nothing to compare."""
KEY_BIASES = ("k_proj.bias", "k_layernorm.bias")
"""Softmax does not see a shift of all keys: such a gradient is zero, and what is computed of it is rounding."""


class Row(NamedTuple):
    """A line of the table; its figures are taken over every variant and layout."""

    oracle: str
    quantity: str
    precision: str


class Difference(NamedTuple):
    """How far a tensor is from the oracle's."""

    absolute: float
    """Of the element that differs most."""
    relative: float
    """Of an output, that over the largest element's size; of a gradient, the difference's norm over its norm."""


@dataclass
class Figures:
    """What is known of a row so far."""

    bound: float
    largest: float = 0.0
    largest_absolute: float = 0.0
    tensors: int = 0
    layouts: set[str] = field(default_factory=set)


class Record:
    """The comparisons of a test session."""

    def __init__(self) -> None:
        self._rows: dict[Row, Figures] = {}

    def of(self, oracle: str, precision: str, layout: str = "one rank") -> "Comparison":
        """Return what compares with `oracle` and enters its figures here."""
        return Comparison(self, oracle, precision, layout)

    def enter(self, row: Row, layout: str, differences: Mapping[str, Difference], bound: float) -> None:
        """Add the differences by tensor to `row`. Raises AssertionError, naming the worst, when one exceeds `bound`."""
        assert differences, f"nothing to compare: {row}"
        figures = self._rows.setdefault(row, Figures(bound))
        assert figures.bound == bound, f"{row} has two bounds: {figures.bound} and {bound}"
        worst = max(differences, key=lambda name: differences[name].relative)
        relative = differences[worst].relative
        absolute = max(difference.absolute for difference in differences.values())
        figures.largest = max(figures.largest, relative)
        figures.largest_absolute = max(figures.largest_absolute, absolute)
        figures.tensors += len(differences)
        figures.layouts.add(layout)
        assert relative <= bound, (
            f"{row.quantity} against {row.oracle} ({row.precision}, {layout}): {worst} differs by {relative:.2e}, "
            f"more than {bound:.0e}"
        )

    def table(self) -> str:
        """Return the rows as a Markdown table, sorted."""
        head = "| oracle | compared | precision | largest difference | bound | the same, absolute | tensors | layouts |"
        lines = [head, "|---|---|---|---|---|---|---|---|"]
        for row, of in sorted(self._rows.items()):
            figures = f"{of.largest:.1e} | {of.bound:.2g} | {of.largest_absolute:.1e} | {of.tensors}"
            lines.append(f"| {' | '.join(row)} | {figures} | {', '.join(sorted(of.layouts))} |".replace("0.0e+00", "0"))
        return "\n".join(lines)

    def write(self, page: Path, command: str) -> None:
        """Put the table, and where it was measured, between the marks of `page`.

        Raises ValueError for a page without the marks.
        """
        text = page.read_text()
        head, found_begin, rest = text.partition(BEGIN)
        _, found_end, tail = rest.partition(END)
        if not found_begin or not found_end:
            raise ValueError(f"{page} has no lines {BEGIN} and {END} for the table to stand between")
        libraries = ", ".join(f"{library} {version(library)}" for library in LIBRARIES)
        machine = f"{os.cpu_count()} core(s) of {platform.machine()}, CPU only, Python {platform.python_version()}"
        origin = f"Written by `{command}` on {datetime.now(UTC):%Y-%m-%d}: {machine}, {libraries}."
        page.write_text(f"{head}{BEGIN}\n{origin}\n\n{self.table()}\n{END}{tail}")


@dataclass(frozen=True)
class Comparison:
    """Compares with one oracle, in one precision, under one layout."""

    record: Record
    oracle: str
    precision: str
    layout: str

    def values(self, quantity: str, actual: Tensor, expected: Tensor, bound: float) -> None:
        """Hold the largest difference between two tensors, over the size of the largest element, to `bound`."""
        size = expected.detach().double().abs().max().item()
        self._enter(quantity, {quantity: _difference(quantity, actual, expected, size, order=float("inf"))}, bound)

    def gradients(self, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float) -> None:
        """Hold the norm of each gradient's difference, over the gradient's norm, to `bound`. Names must be the same.

        Every gradient must be there to be compared, except those of key biases, whose differences are taken over the
        norm of the weight's gradient.
        """
        assert actual.keys() == expected.keys(), actual.keys() ^ expected.keys()
        differences = {}
        for name, theirs in expected.items():
            sized = expected[name.removesuffix("bias") + "weight"] if name.endswith(KEY_BIASES) else theirs
            differences[name] = _difference(name, actual[name], theirs, sized.double().norm().item(), order=2.0)
        self._enter("gradients", differences, bound)

    def _enter(self, quantity: str, differences: Mapping[str, Difference], bound: float) -> None:
        self.record.enter(Row(self.oracle, quantity, self.precision), self.layout, differences, bound)


def _difference(name: str, actual: Tensor, expected: Tensor, size: float, order: float) -> Difference:
    """Return the difference of two tensors; what is taken over `size` is its norm of that order."""
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} and {tuple(expected.shape)}"
    assert size > SMALLEST, f"nothing to compare: {name} is of size {size:.1e}"
    difference = (actual.detach().double() - expected.detach().double()).flatten()
    assert difference.isfinite().all(), f"{name} is not finite"
    return Difference(difference.abs().max().item(), torch.linalg.vector_norm(difference, order).item() / size)


def is_whole_folder(arguments: Iterable[str], root: Path) -> bool:
    """Whether pytest was asked for all parity tests, and nothing else."""
    return [(root / argument).resolve() for argument in arguments] == [Path(__file__).parent]
