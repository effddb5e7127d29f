"""What stands beside a tokenizer's model in its folder: which ids are special, and what a newline becomes.

No torch: the configuration check reads `vocab_size` before torch is loaded.
"""

import hashlib
import json
from typing import Literal, Self

from pydantic import NonNegativeInt, PositiveInt, model_validator

from megatron_kosmos.config.base import StrictModel

SETTINGS_FILE = "kosmos_tokenizer.json"

Backend = Literal["sentencepiece", "tokenizers"]
MODEL_FILES: dict[Backend, str] = {"sentencepiece": "tokenizer.model", "tokenizers": "tokenizer.json"}
"""The model's file in the folder; `tokenizers` is Hugging Face's library."""

Newlines = Literal["line", "collapse", "keep"]


class TokenizerSettings(StrictModel):
    """`kosmos_tokenizer.json`: how ids follow from the pieces of the model."""

    format: Literal[1] = 1
    backend: Backend = "sentencepiece"
    """The library that reads the model. Folders from before there were two name none."""
    vocab_size: PositiveInt
    """Ids 0 … vocab_size - 1 exist, special tokens included."""
    special_tokens: dict[str, NonNegativeInt]
    """Id of each special token; `<s>` and `</s>` may share one."""
    piece_offset: NonNegativeInt = 0
    """Id of an ordinary piece minus its number in a sentencepiece model: 1 in XLM-R's fairseq numbering."""
    newlines: Newlines
    """`line` writes a newline as `</line>` and reads it back; `collapse` makes it a space; `keep`, in the `tokenizers`
    backend, leaves it to the model: a byte-level one writes the byte that it is."""

    @model_validator(mode="after")
    def _newlines_fit_the_backend(self) -> Self:
        if (self.newlines == "keep") != (self.backend == "tokenizers"):
            raise ValueError(
                f"newlines={self.newlines!r} does not go with backend={self.backend!r}: newlines are 'keep' in the "
                f"tokenizers backend, 'line' or 'collapse' in sentencepiece's"
            )
        return self

    @model_validator(mode="after")
    def _ids_are_in_the_vocabulary(self) -> Self:
        outside = [token for token, number in self.special_tokens.items() if number >= self.vocab_size]
        if outside:
            raise ValueError(f"the ids of {' '.join(outside)} are not below vocab_size={self.vocab_size}")
        return self

    def fingerprint_with(self, model: bytes) -> str:
        """Return the sha256 (hexadecimal) of the settings and of `model`, the bytes of the model's file."""
        not_told = {"backend"} if self.backend == "sentencepiece" else set[str]()  # corpora recorded it without
        settings = json.dumps(self.model_dump(exclude=not_told), sort_keys=True).encode()
        return hashlib.sha256(settings + b"\n" + model).hexdigest()
