"""A sentencepiece model as a tokenizer's backend: pieces numbered with an offset, newlines by policy."""

import marshal
from collections.abc import Sequence
from itertools import chain

import numpy as np
import sentencepiece

from megatron_kosmos.data.arrays import Int32Array, Int64Array
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.tokenization.settings import TokenizerSettings
from megatron_kosmos.prompt import LINE, UNK

PIECE = np.dtype([("kind", "u1"), ("number", "<i4")])
"""An integer in marshal's format 2 or, of kind `[`, the length of a list whose items come next."""
LIST = ord("[")
MARSHAL_FORMAT = 2


class SentencePieceBackend:
    """Text to ids and back. Control symbols are never matched in a text, so special tokens in it stay text."""

    def __init__(self, model: bytes, settings: TokenizerSettings, origin: str) -> None:
        """Take the bytes of a sentencepiece `model`. Raises DataError when it does not load."""
        self._pieces = load_pieces(model, origin)
        self._offset = settings.piece_offset
        self._unk_id = settings.special_tokens[UNK]
        self._line_id = settings.special_tokens[LINE] if settings.newlines == "line" else None
        self._id_of_piece = np.arange(self._pieces.get_piece_size(), dtype=np.int32) + self._offset
        self._id_of_piece[self._pieces.unk_id()] = self._unk_id
        # Of two names of an id the first counts.
        self._names = {number: name for name, number in reversed(settings.special_tokens.items())}

    def encode(self, texts: Sequence[str]) -> tuple[Int32Array, Int64Array]:
        """Return the ids of all `texts`, one after the other, and how many of them each text has.

        Raises UnicodeEncodeError for a text with lone surrogates.
        """
        if self._line_id is None:
            lines, num_lines = [text.replace("\n", " ") for text in texts], np.ones(len(texts), np.int64)
        else:
            lines_of = [text.split("\n") for text in texts]
            lines, num_lines = list(chain.from_iterable(lines_of)), np.array(list(map(len, lines_of)), np.int64)
        pieces, starts = flattened(self._pieces_of(lines))
        ids = np.empty(len(pieces), np.int32)
        # Where a line starts there is its length: taken modulo their number, it is some piece.
        np.take(self._id_of_piece, pieces, out=ids, mode="wrap")
        if self._line_id is not None:
            ids[starts] = self._line_id
        # A text's first line has no newline before it.
        firsts = starts[np.cumsum(num_lines) - num_lines]
        return np.delete(ids, firsts), np.diff(firsts, append=len(ids)) - 1

    def _pieces_of(self, lines: list[str]) -> list[list[int]]:
        try:
            pieces: list[list[int]] = self._pieces.encode(lines, num_threads=1)  # preparation has a process a core
        except (RuntimeError, TypeError):
            for line in lines:
                line.encode("utf-8")  # a lone surrogate: this says which; sentencepiece only that it cannot cast
            raise
        return pieces

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """Return the text of `ids`; `</line>` becomes a newline, other special tokens vanish or keep their names."""
        text: list[str] = []
        run: list[int] = []
        for number in ids:
            if number not in self._names:
                run.append(number - self._offset)
                continue
            text.append(self._pieces.decode(run))
            run = []
            if number == self._line_id:
                text.append("\n")
            elif not skip_special:
                text.append(self._names[number])
        text.append(self._pieces.decode(run))
        return "".join(text)

    def piece(self, number: int) -> str:
        """Return how the model writes the token `number`, `▁` for a space, or the name of a special token."""
        name: str | None = self._names.get(number)
        return name if name is not None else str(self._pieces.id_to_piece(number - self._offset))


def flattened(lists: list[list[int]]) -> tuple[Int32Array, Int64Array]:
    """Return the items of all lists, one after the other and the length of each list before them, and where these are.

    By way of marshal, which writes a million integers in a third of the time that numpy takes to read them: five bytes
    for each, and as many for the beginning of a list. Raises ValueError for other items than integers of 32 bits.
    """
    data = np.frombuffer(marshal.dumps(lists, MARSHAL_FORMAT), PIECE)[1:]
    starts = np.flatnonzero(data["kind"] == LIST)
    if len(starts) != len(lists):
        raise ValueError("integers of 32 bits are asked for")
    return data["number"], starts


def load_pieces(model: bytes, origin: str) -> sentencepiece.SentencePieceProcessor:
    """Return a processor of the serialized `model`. Raises DataError when it is not a sentencepiece model."""
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise DataError(f"{origin} holds no sentencepiece model: {error}") from error
    return pieces
