"""What preparation may leave out: the paper's filters, pictures that downloads lack, and what was there before."""

from pydantic import PositiveInt

from megatron_kosmos.config.base import StrictModel


class Filters(StrictModel):
    """The paper's choice among interleaved documents (arXiv 2302.14045, section 3.1), and ours; all off by default."""

    max_images: PositiveInt | None = None
    """Pictures of a document to keep; later ones are dropped, their text stays. The paper: 5."""
    halve_single_image: bool = False
    """Drop half of the documents with one picture, chosen by a hash of their content."""
    min_image_side: PositiveInt | None = None
    """Drop pictures with a shorter side, in pixels. The paper: 64."""
    drop_single_colour: bool = False
    """Drop pictures of one colour."""
    drop_unusable_images: bool = False
    """Drop pictures that are missing, remote or damaged instead of the documents that have them. Not in the paper."""
    drop_duplicate_documents: bool = False
    """Drop documents whose tokens and pictures are those of an earlier one."""
    drop_duplicate_images: bool = False
    """Drop pictures whose bytes are those of an earlier one, and documents that had no others."""
