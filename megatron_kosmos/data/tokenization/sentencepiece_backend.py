"""A sentencepiece model as a tokenizer's backend: pieces numbered with an offset, newlines by policy."""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import sentencepiece

from megatron_kosmos.data.arrays import Int32Array, Int64Array
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.tokenization.settings import TokenizerSettings
from megatron_kosmos.prompt import LINE, UNK

END_OF_LINE = -1
"""Stands behind the pieces of each line until pieces become ids: the last place of the table of ids."""


class SentencePieceBackend:
    """Text to ids and back. Control symbols are never matched in a text, so special tokens in it stay text."""

    def __init__(self, model: bytes, settings: TokenizerSettings, origin: str) -> None:
        """Take the bytes of a sentencepiece `model`. Raises DataError when it does not load."""
        self._pieces = load_pieces(model, origin)
        self._offset = settings.piece_offset
        self._unk_id = settings.special_tokens[UNK]
        self._line_id = settings.special_tokens[LINE] if settings.newlines == "line" else None
        self._id_of_piece = np.arange(self._pieces.get_piece_size() + 1, dtype=np.int32) + self._offset
        self._id_of_piece[self._pieces.unk_id()] = self._unk_id
        self._id_of_piece[END_OF_LINE] = -1 if self._line_id is None else self._line_id
        # Of two names of an id the first counts.
        self._names = {number: name for name, number in reversed(settings.special_tokens.items())}

    def encode(self, texts: Sequence[str]) -> tuple[Int32Array, Int64Array]:
        """Return the ids of all `texts`, one after the other, and how many of them each text has.

        Raises UnicodeEncodeError for a text with lone surrogates.
        """
        if self._line_id is None:
            lines_of = [[text.replace("\n", " ")] for text in texts]
        else:
            lines_of = [text.split("\n") for text in texts]
        lines = list(chain.from_iterable(lines_of))
        pieces_of = self._pieces_of(list(dict.fromkeys(lines)))  # a line that is there twice is encoded once
        pieces = [pieces_of[line] for line in lines]
        ids = self._id_of_piece[np.fromiter(chain.from_iterable(pieces), np.intp)]
        ends_of_lines = np.cumsum(np.fromiter(map(len, pieces), np.int64, len(pieces)))
        ends = ends_of_lines[np.cumsum(np.fromiter(map(len, lines_of), np.int64, len(lines_of))) - 1]
        # A text's last line has no newline behind it.
        return np.delete(ids, ends - 1), np.diff(ends, prepend=0) - 1

    def _pieces_of(self, lines: list[str]) -> dict[str, list[int]]:
        """Return the pieces of each line, and END_OF_LINE behind them."""
        try:
            encoded = self._pieces.encode(lines, num_threads=1)  # preparation has a process for each core
        except (RuntimeError, TypeError):
            for line in lines:
                line.encode("utf-8")  # a lone surrogate: this says which; sentencepiece only that it cannot cast
            raise
        for pieces in encoded:
            pieces.append(END_OF_LINE)
        return dict(zip(lines, encoded, strict=True))

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


def load_pieces(model: bytes, origin: str) -> sentencepiece.SentencePieceProcessor:
    """Return a processor of the serialized `model`. Raises DataError when it is not a sentencepiece model."""
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise DataError(f"{origin} holds no sentencepiece model: {error}") from error
    return pieces
