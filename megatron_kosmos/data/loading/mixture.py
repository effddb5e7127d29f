"""The order of training: which row of which corpus a sample is, as a pure function of the seed and the sample's index.

Nothing is drawn one after the other, so there is no state: a run resumes with one integer, under any number of
data-parallel ranks and worker processes (docs/decisions/0005).
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from megatron_kosmos.config.data import Packing
from megatron_kosmos.data.hashing import shuffled
from megatron_kosmos.data.loading.blend import EndingBlend, Share
from megatron_kosmos.data.loading.packed_rows import PackedRow, Packer
from megatron_kosmos.data.packing.plan_store import PlanStore, PlanSummary, plan_key
from megatron_kosmos.data.packing.planning import EpochPlan


class Epochs:
    """The rows of one corpus, endless but for a limit: epoch after epoch, its documents in another order each time."""

    def __init__(
        self, packer: Packer, seed: int, stream: int, packing: Packing = "concatenate", plans: PlanStore | None = None
    ) -> None:
        """`stream` tells the corpora of a run apart. Without `plans` every process plans for itself."""
        self._packer, self._seed, self._stream, self._packing = packer, seed, stream, packing
        self._plans = PlanStore(None) if plans is None else plans
        self._key = plan_key(packer.identity, packing, seed, stream)
        self._first_rows = [0]
        """Rows before each epoch that was asked for so far. Epochs differ in rows, since padding falls differently."""
        self._plan = lru_cache(maxsize=2)(self._open_plan)

    def _open_plan(self, epoch: int) -> EpochPlan:
        return self._plans.plan(self._key, epoch, partial(self._make_plan, epoch))

    def _make_plan(self, epoch: int) -> EpochPlan:
        documents = self._packer.documents
        order = documents[shuffled(len(documents), self._seed, self._stream, epoch)]
        return self._packer.plan(order, self._packing, lambda rows: shuffled(rows, self._seed, self._stream, epoch, 1))

    def summary(self, epoch: int) -> PlanSummary:
        """Return what there is to say about an epoch. It is planned for that, unless it was before."""
        return self._plans.summary(self._key, epoch) or PlanSummary.of(self._plan(epoch))

    def count_rows(self, num_epochs: int) -> int:
        """Return the rows of the first `num_epochs` epochs."""
        missing = range(len(self._first_rows) - 1, num_epochs)
        # The last one first: what is planned last is read next, and a later plan would remove it.
        summaries = [self.summary(epoch) for epoch in reversed(missing)]
        for summary in reversed(summaries):
            self._first_rows.append(self._first_rows[-1] + summary.num_rows)
        return self._first_rows[num_epochs]

    def locate(self, number: int) -> tuple[int, int]:
        """Return the epoch of the corpus's row `number`, and the row within the epoch.

        The first call for an epoch plans the ones before it, unless they were planned before: seconds for each ten
        million documents.
        """
        while self._first_rows[-1] <= number:
            self.count_rows(len(self._first_rows))
        epoch = bisect_right(self._first_rows, number) - 1
        return epoch, number - self._first_rows[epoch]

    def row(self, number: int) -> PackedRow:
        """Return the corpus's row `number`, counted over all epochs."""
        epoch, row = self.locate(number)
        return self._packer.row(self._plan(epoch), row)

    def documents(self, number: int) -> list[int]:
        """Return the documents in the corpus's row `number`."""
        epoch, row = self.locate(number)
        return self._packer.documents_of_row(self._plan(epoch), row)


@dataclass(frozen=True)
class Sample:
    """One training sequence and where it comes from."""

    corpus: int
    row: PackedRow
    index: int
    """Its place in the order of the whole run."""


class Mixture:
    """The samples of a run."""

    def __init__(
        self,
        packers: Sequence[Packer],
        weights: Sequence[float],
        seed: int,
        packing: Packing = "concatenate",
        num_epochs: Sequence[int | None] | None = None,
        plans: PlanStore | None = None,
    ) -> None:
        """`num_epochs` says after how many epochs each corpus ends, None never. Such corpora are planned at once."""
        self.packers = packers
        """The rows of each corpus, in the order of the numbers of corpora."""
        self._epochs = [Epochs(packer, seed, stream, packing, plans) for stream, packer in enumerate(packers)]
        self.blend = EndingBlend(
            [
                Share(packer.corpus.kind, weight, None if limit is None else epochs.count_rows(limit))
                for packer, weight, epochs, limit in zip(
                    packers, weights, self._epochs, num_epochs or [None] * len(packers), strict=True
                )
            ]
        )

    def __getitem__(self, index: int) -> Sample:
        """Return the sample with the global `index`. Raises IndexError when all corpora have ended before."""
        corpus, number = self.blend.locate(index)
        return Sample(corpus, self._epochs[corpus].row(number), index)

    def origin(self, index: int) -> dict[str, Any]:
        """Return what to look a sample up by: its global index, and the corpus and documents it is of."""
        corpus, number = self.blend.locate(index)
        prefix = str(self.packers[corpus].corpus.prefix)
        return {"sample": index, "corpus": prefix, "documents": self._epochs[corpus].documents(number)}

    def summaries(self) -> list[PlanSummary]:
        """Return what there is to say about the first epoch of each corpus."""
        return [epochs.summary(0) for epochs in self._epochs]
