"""What a manifest says of packing: how full rows get, and how many documents are cut, each way.

Shape letters: D documents.
"""

from typing import Any, get_args

from numpy.typing import NDArray
from pydantic import NonNegativeInt, PositiveInt

from megatron_kosmos.config.base import StrictModel
from megatron_kosmos.config.data import Packing
from megatron_kosmos.data.hashing import shuffled
from megatron_kosmos.data.packing.planning import ImagePlaces, Planner
from megatron_kosmos.data.packing.row_format import RowFormat
from megatron_kosmos.prompt import SourceKind


class PackingSummary(StrictModel):
    """How well one way of packing fills the rows of an epoch."""

    rows: PositiveInt
    efficiency: float
    """Share of the positions that are not padding."""
    documents_cut: NonNegativeInt
    """Documents that lie in more than one row."""


def summarize_packing(
    kind: SourceKind, lengths: NDArray[Any], places: ImagePlaces | None, row_format: RowFormat
) -> dict[Packing, PackingSummary]:
    """Return what each way of packing makes of an epoch of all documents, in the order of seed 0.

    The arguments are those of `Planner`; every document must fit a row with its pictures.
    """
    planner = Planner(kind, lengths, places, row_format)
    order = shuffled(len(lengths), 0)
    summaries: dict[Packing, PackingSummary] = {}
    for packing in get_args(Packing):
        plan = planner.plan(order, packing)
        summaries[packing] = PackingSummary(
            rows=plan.num_rows,
            efficiency=plan.num_tokens / (plan.num_rows * row_format.sequence_length),
            documents_cut=plan.count_cut_documents(),
        )
    return summaries
