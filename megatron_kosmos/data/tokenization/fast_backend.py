"""A Hugging Face tokenizer.json as a tokenizer's backend: byte-level BPE and its kin, through the `tokenizers` library.

`fast_making` writes these files: every special token is in them, marked as special, so that the library can be told to
take special tokens in a text for text, and ids are those that transformers gives.
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np
from tokenizers import Tokenizer

from megatron_kosmos.data.arrays import Int32Array, Int64Array
from megatron_kosmos.data.errors import DataError


class FastBackend:
    """Text to ids and back. Newlines are the model's business: a byte-level one writes them as any other byte."""

    def __init__(self, model: bytes, origin: str) -> None:
        """Take the bytes of a tokenizer.json. Raises DataError when the library does not read it."""
        self._tokenizer = load_fast(model, origin)

    def encode(self, texts: Sequence[str]) -> tuple[Int32Array, Int64Array]:
        """Return the ids of all `texts`, one after the other, and how many of them each text has.

        Raises UnicodeEncodeError for a text with lone surrogates.
        """
        ids_of = [self._encode(text) for text in texts]
        ids = np.fromiter(chain.from_iterable(ids_of), np.int32)
        return ids, np.fromiter(map(len, ids_of), np.int64, len(ids_of))

    def _encode(self, text: str) -> list[int]:
        try:
            # One text at a time: a batch takes as long on one core, and preprocessing has a process for each core.
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        except TypeError:
            text.encode("utf-8")  # a lone surrogate: this says which; the library only that it is no text
            raise
        ids: list[int] = encoding.ids
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """Return the text of `ids`; special tokens vanish or keep their names. Bytes that are no UTF-8 turn U+FFFD."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def piece(self, number: int) -> str:
        """Return how the model writes the token `number`; a byte-level one writes `Ġ` for a space."""
        return self._tokenizer.id_to_token(number) or f"[id {number}]"


def load_fast(model: bytes, origin: str) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json; special tokens in a text are text. Raises DataError."""
    try:
        tokenizer = Tokenizer.from_buffer(model)
    except ValueError as error:
        raise DataError(f"{origin} holds no tokenizer.json that the tokenizers library reads: {error}") from error
    tokenizer.encode_special_tokens = True
    return tokenizer
