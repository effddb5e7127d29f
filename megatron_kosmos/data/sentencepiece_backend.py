"""A sentencepiece model as a tokenizer's backend: pieces numbered with an offset, newlines by policy."""

from collections.abc import Sequence

import sentencepiece

from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.tokenizer_settings import TokenizerSettings
from megatron_kosmos.prompt import LINE, UNK


class SentencePieceBackend:
    """Text to ids and back. Control symbols are never matched in a text, so special tokens in it stay text."""

    def __init__(self, model: bytes, settings: TokenizerSettings, origin: str) -> None:
        """Take the bytes of a sentencepiece `model`. Raises DataError when it does not load."""
        self._pieces = load_pieces(model, origin)
        self._offset = settings.piece_offset
        self._unk_id = settings.special_tokens[UNK]
        self._line_id = settings.special_tokens[LINE] if settings.newlines == "line" else None
        # Of two names of an id the first counts.
        self._names = {number: name for name, number in reversed(settings.special_tokens.items())}

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`. Raises UnicodeEncodeError for a text with lone surrogates."""
        if self._line_id is None:
            return self._encode_line(text.replace("\n", " "))
        first, *rest = text.split("\n")
        ids = self._encode_line(first)
        for line in rest:
            ids.append(self._line_id)
            ids += self._encode_line(line)
        return ids

    def _encode_line(self, line: str) -> list[int]:
        try:
            pieces = self._pieces.encode(line)
        except RuntimeError:
            line.encode("utf-8")  # a lone surrogate: this says which; sentencepiece only that it cannot cast
            raise
        unknown = self._pieces.unk_id()
        if self._offset == 0 and unknown == self._unk_id:
            return pieces
        return [self._unk_id if piece == unknown else piece + self._offset for piece in pieces]

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
