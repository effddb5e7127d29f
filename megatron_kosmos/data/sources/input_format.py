"""Where documents lie in their records: the names of the fields, and the folder of pictures."""

from pathlib import Path

from megatron_kosmos.config.base import StrictModel


class InputFormat(StrictModel):
    """Names of fields (JSON) or columns (parquet), where they are not the usual ones."""

    text_field: str = "text"
    """Text of a text document."""
    image_field: str = "image"
    """Picture of a captioned one: a path, its bytes, or Hugging Face's {bytes, path}."""
    caption_field: str = "caption"
    """Its caption. In a tar, another name than this takes the caption from the .json instead of the .txt."""
    image_folder: Path | None = None
    """Where relative paths of pictures start, which those that web pages name may not leave; for HTML, the root of the
    site. None: the folder of the input file."""


USUAL = InputFormat()
"""The names that need not be given."""
