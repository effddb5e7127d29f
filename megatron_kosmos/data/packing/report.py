"""What a run says of its packing: how full sequences are, which documents are cut, which corpora end."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_kosmos.config.data import Packing
from megatron_kosmos.data.packing.plan_store import PlanSummary


@dataclass(frozen=True)
class CorpusPacking:
    """The first epoch of one corpus."""

    name: str
    weight: float
    summary: PlanSummary
    last_step: int | None = None
    """Steps after which the corpus has ended; None: it does not end."""

    def efficiency(self, sequence_length: int) -> float:
        """Return the share of the positions that are not padding."""
        return self.summary.num_tokens / (self.summary.num_rows * sequence_length)


@dataclass(frozen=True)
class PackingReport:
    """The first epoch of every corpus."""

    packing: Packing
    sequence_length: int
    corpora: Sequence[CorpusPacking]

    @property
    def efficiency(self) -> float:
        """Share of the positions that are not padding, with the corpora's weights."""
        weight = sum(corpus.weight for corpus in self.corpora)
        return sum(corpus.weight * corpus.efficiency(self.sequence_length) for corpus in self.corpora) / weight

    @property
    def documents_cut(self) -> int:
        """Documents that lie in more than one sequence, in one epoch of each corpus."""
        return sum(corpus.summary.documents_cut for corpus in self.corpora)

    def __str__(self) -> str:
        lines = [
            f"packing {self.packing}: {self.efficiency:.2%} of {self.sequence_length} positions filled, "
            f"{self.documents_cut:,} documents cut in an epoch of each corpus"
        ]
        for corpus in self.corpora:
            summary = corpus.summary
            lines.append(
                f"  {corpus.name}: {summary.num_rows:,} sequences an epoch, "
                f"{corpus.efficiency(self.sequence_length):.2%} filled, {summary.documents_cut:,} documents cut"
            )
            if corpus.last_step is not None:
                lines[-1] += f"; ends at step {corpus.last_step:,}, its weight goes to the others"
        return "\n".join(lines)
