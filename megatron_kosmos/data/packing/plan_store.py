"""Plans of epochs in files, so that one process plans and all of a machine read the same memory.

A plan is `KEY-epochE.plan`, int64 that are read through mmap: data ranks and their worker processes share the pages.
They are N pieces, R rows, whether there are offsets, the arrays of `EpochPlan`, and the sha256 of all that.
`KEY-epochE.json` is what is still known when the plan has been removed, two epochs later. Files that are damaged are
taken for absent: data never depend on them.
"""

import hashlib
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from pydantic import NonNegativeInt, PositiveInt, ValidationError

from megatron_kosmos.config.base import StrictModel
from megatron_kosmos.data.arrays import Int64Array
from megatron_kosmos.data.packing.planning import EpochPlan
from megatron_kosmos.data.shared_files import locked, read_arrays, write_arrays, write_whole

logger = logging.getLogger(__name__)

FORMAT = 2
"""To be raised with any change of the files or of what is planned: plans of another format are not looked at."""
KEPT_EPOCHS = 2


class PlanSummary(StrictModel):
    """What there is to say about the plan of an epoch."""

    num_rows: PositiveInt
    num_tokens: PositiveInt
    """Tokens, slots included, without padding."""
    documents_cut: NonNegativeInt
    """Documents that lie in more than one row."""

    @classmethod
    def of(cls, plan: EpochPlan) -> "PlanSummary":
        """Count."""
        return cls(num_rows=plan.num_rows, num_tokens=plan.num_tokens, documents_cut=plan.count_cut_documents())


class _StoredSummary(PlanSummary):
    """`KEY-epochE.json`."""

    sha256: str

    @classmethod
    def seal(cls, summary: PlanSummary) -> "_StoredSummary":
        """Add the checksum."""
        values = summary.model_dump()
        return cls(**values, sha256=hashlib.sha256(repr(values).encode()).hexdigest())

    def unseal(self) -> PlanSummary | None:
        """Return the summary, None when the checksum is another's."""
        summary = PlanSummary(**self.model_dump(exclude={"sha256"}))
        return summary if self.seal(summary) == self else None


def plan_key(*depends_on: str | int) -> str:
    """Return the name of the plans that follow from these."""
    return hashlib.sha256(repr((FORMAT, *depends_on)).encode()).hexdigest()[:16]


class PlanStore:
    """The plans in `folder`, which may be deleted whenever no run uses it; with None, each process has its own."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._summaries: dict[tuple[str, int], PlanSummary] = {}

    def plan(self, key: str, epoch: int, make: Callable[[], EpochPlan]) -> EpochPlan:
        """Return the plan of an epoch: the one that is there, or what `make` returns, which others then find.

        A folder that cannot be written to costs memory and time, not the run.
        """
        if self._folder is None:
            return self._remember(key, epoch, make())
        path = self._folder / f"{key}-epoch{epoch}.plan"
        with locked(self._folder / f"{key}.lock"):
            plan = _read(path)
            if plan is not None:
                return plan
            plan = self._remember(key, epoch, make())
            summary = _StoredSummary.seal(self._summaries[key, epoch]).model_dump_json().encode()
            try:
                write_whole(path.with_suffix(".json"), lambda file: file.write(summary))
                write_arrays(path, _arrays(plan))
            except OSError as error:
                logger.warning("every process plans epoch %d for itself: %s cannot be written: %s", epoch, path, error)
                return plan
            for old in range(epoch - KEPT_EPOCHS + 1):
                (self._folder / f"{key}-epoch{old}.plan").unlink(missing_ok=True)
        return _read(path) or plan

    def summary(self, key: str, epoch: int) -> PlanSummary | None:
        """Return the summary of an epoch that was planned before, None if it was not."""
        if (key, epoch) not in self._summaries and self._folder is not None:
            with suppress(OSError, ValidationError):
                content = (self._folder / f"{key}-epoch{epoch}.json").read_bytes()
                summary = _StoredSummary.model_validate_json(content).unseal()
                if summary is not None:
                    self._summaries[key, epoch] = summary
        return self._summaries.get((key, epoch))

    def _remember(self, key: str, epoch: int, plan: EpochPlan) -> EpochPlan:
        self._summaries[key, epoch] = PlanSummary.of(plan)
        return plan


def _arrays(plan: EpochPlan) -> list[Int64Array]:
    head = np.array([len(plan.documents), plan.num_rows, plan.offsets is not None], dtype=np.int64)
    arrays = [head, plan.documents, plan.piece_starts, plan.row_starts, plan.row_stops]
    return arrays if plan.offsets is None else [*arrays, plan.offsets]


def _read(path: Path) -> EpochPlan | None:
    """Return the plan in a file, through mmap; None where there is no whole one."""
    content = read_arrays(path)
    if content is None:
        return None
    num_pieces, num_rows, has_offsets = content[:3].tolist()
    sizes = [num_pieces, num_pieces + 1, num_rows, num_rows, num_pieces * has_offsets]
    documents, piece_starts, row_starts, row_stops, offsets = np.split(content[3:], np.cumsum(sizes)[:-1])
    return EpochPlan(documents, piece_starts, offsets if has_offsets else None, row_starts, row_stops)
