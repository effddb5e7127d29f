"""A picture that a document refers to, not read yet."""

from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from megatron_kosmos.data.errors import UnusableImage
from megatron_kosmos.data.sources.readers.records import MAX_RECORD_BYTES, too_large


@dataclass(frozen=True)
class ImageReference:
    """A picture of a document: a file, bytes that came with the document, or None for one that is elsewhere."""

    name: str
    source: Path | bytes | UnusableImage | None
    """An error stands for a picture that may not be read."""

    def read(self) -> bytes:
        """Return the encoded picture. Raises UnusableImage when it cannot be read."""
        if isinstance(self.source, bytes):
            return self.source
        if isinstance(self.source, UnusableImage):
            raise self.source
        if self.source is None:
            raise UnusableImage(
                "remote_image",
                f"{self.name} is an address, not a picture on this machine: download the pictures first, with"
                " img2dataset, and prepare what it writes",
            )
        try:
            status = self.source.stat()
            if not S_ISREG(status.st_mode):  # a device or a pipe might never end
                raise UnusableImage("missing_image", f"there is no picture at {self.source}, but something else")
            if status.st_size > MAX_RECORD_BYTES:
                problem = too_large(status.st_size, MAX_RECORD_BYTES, f"the picture at {self.source}")
                raise UnusableImage(problem.reason, problem.detail)
            return self.source.read_bytes()
        except FileNotFoundError as error:
            raise UnusableImage("missing_image", f"there is no picture at {self.source}") from error
        except OSError as error:
            raise UnusableImage("missing_image", f"the picture at {self.source}: {error.strerror}") from error
        except UnusableImage:
            raise
        except ValueError as error:  # a NUL, or a character that the file system cannot write
            raise UnusableImage("missing_image", f"{self.name!r} is no name of a file: {error}") from error
