"""What preparation may leave out: the paper's filters, pictures that downloads lack, duplicates, and texts."""

from typing import Annotated, Self

from pydantic import Field, PositiveInt, model_validator

from megatron_kosmos.config.base import StrictModel

Share = Annotated[float, Field(ge=0, le=1)]


class TextHook(StrictModel):
    """A function of the user's own that sees each text of a text document."""

    name: str
    """`package.module:function`, from str to str or None."""
    sha256: str | None
    """Hash of the module's file (hexadecimal); None for one that has no source. What it imports is not in it."""


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

    # Of text documents: rules of Gopher's data (arXiv 2112.11446, appendix A.1), which count words, not characters.
    min_characters: PositiveInt | None = None
    """Drop shorter texts."""
    max_characters: PositiveInt | None = None
    """Drop longer texts."""
    min_alphabetic_words: Share | None = None
    """Drop texts with a smaller share of words that have a letter. Gopher: 0.8."""
    max_duplicate_lines: Share | None = None
    """Drop texts with a larger share of lines that repeat an earlier one. Gopher: 0.3."""
    text_hook: TextHook | None = None
    """Replaces texts, or drops them, before the other filters see them."""

    @model_validator(mode="after")
    def _some_length_is_left(self) -> Self:
        if self.min_characters and self.max_characters and self.min_characters > self.max_characters:
            raise ValueError(
                f"min_characters={self.min_characters} and max_characters={self.max_characters} leave no text"
            )
        return self

    def only_for_text(self) -> list[str]:
        """Return the names of those in use that are for text documents."""
        return [name for name in TEXT_FILTERS if getattr(self, name) is not None]


TEXT_FILTERS = ("min_characters", "max_characters", "min_alphabetic_words", "max_duplicate_lines", "text_hook")
