"""The shape of a training sequence as far as data preparation and packing know it.

Shape letters: T tokens of a row, L slots of a picture.
"""

from pydantic import PositiveInt

from megatron_kosmos.config.base import StrictModel


class RowFormat(StrictModel):
    """How long a row is, and how much of it a picture takes."""

    sequence_length: PositiveInt = 2048
    """T."""
    num_latents: PositiveInt = 64
    """L, the resampler's latents."""

    @property
    def block_length(self) -> int:
        """Tokens of a picture: `<image>`, its L slots, `</image>`."""
        return self.num_latents + 2

    @property
    def max_images(self) -> int:
        """Pictures that fit a row together with `<s>` and `</s>`."""
        return (self.sequence_length - 2) // self.block_length

    def problem(self, num_images: int) -> str | None:
        """Return what is wrong with a document of `num_images` pictures, or None."""
        if num_images <= self.max_images:
            return None
        return (
            f"{num_images} pictures of {self.num_latents} slots with their markers, <s> and </s> take "
            f"{num_images * self.block_length + 2} tokens; a sequence has {self.sequence_length}"
        )
