"""What every conversion shares: an output that appears at once or not at all, the report, and the bound of the gate."""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_kosmos import __version__

logger = logging.getLogger(__name__)

MAX_ABS_LOGIT_DIFF = 1e-4
"""Largest difference in fp32 between the two models' logits that is taken for rounding."""
MAX_FILE_BYTES = 1 << 30
"""Largest weight file, which is also about the memory that a conversion takes besides verification."""
REPORT_FILE = "conversion.json"


class ConversionError(ValueError):
    """A conversion that cannot be made; the message says what, where and what to do."""


@dataclass(frozen=True)
class ConversionReport:
    """What was converted; `conversion.json` in the folder."""

    source: str
    step: int
    num_parameters: int
    dtype: str
    max_abs_logit_diff: float | None
    """Between the two models; None if they were not compared."""
    bound: float = MAX_ABS_LOGIT_DIFF
    code_version: str = __version__

    def check(self) -> None:
        """Raise ConversionError where the models differ."""
        difference = self.max_abs_logit_diff
        if difference is None:
            logger.warning("the logits of the two models were not compared")
        elif not difference <= self.bound:  # NaN, too
            raise ConversionError(
                f"the converted model's logits differ from the source's by {difference:.3g}, more than "
                f"{self.bound:.0e}; nothing was put in place"
            )

    def write(self, folder: Path) -> None:
        """Write the report beside the converted files."""
        (folder / REPORT_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def refuse_existing(output: Path, overwrite: bool, *inputs: Path) -> None:
    """Raise ConversionError where `output` is there and is not to be replaced, or cannot be: it has an input in it."""
    if output.is_symlink():
        raise ConversionError(f"{output} is a link; name the folder that it leads to, or remove it")
    if output.exists() and not overwrite:
        raise ConversionError(f"{output} exists; choose another folder or pass --overwrite")
    if output.exists() and not output.is_dir():
        raise ConversionError(f"{output} is a file; choose another name for the folder to make")
    place = output.resolve()
    for one in inputs:
        if place == one.resolve() or place in one.resolve().parents:
            raise ConversionError(f"{output} is or has in it {one}, which is to be converted; choose another folder")


@contextmanager
def new_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """Give a folder to write to, beside `output`; it takes that name at the end, unless something was raised.

    Raises ConversionError where something has come to be there meanwhile, unless it is to be replaced, and for a disk
    that takes no more.
    """
    output = output.absolute()
    writing = output.with_name(f".{output.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    try:
        yield writing
        refuse_existing(output, overwrite)
        _put_in_place(writing, output)
    except OSError as error:
        raise ConversionError(f"writing {output} failed, so nothing was put in place: {error}") from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def _put_in_place(writing: Path, output: Path) -> None:
    """Rename `writing` to `output`; what stood there is removed only when the new folder has its place."""
    if not output.exists():
        writing.rename(output)
        return
    replaced = writing.with_suffix(".replaced")
    if replaced.exists():  # by a conversion that was killed; what it was to be replaced with has been made since
        shutil.rmtree(replaced)
    output.rename(replaced)
    writing.rename(output)
    shutil.rmtree(replaced)
