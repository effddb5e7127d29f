"""The tokenizer: a sentencepiece model, special tokens that text can never produce, and a chosen newline policy.

A tokenizer is a folder with `tokenizer.model` (sentencepiece) and `kosmos_tokenizer.json` (`TokenizerSettings`).
No torch: the configuration check reads `vocab_size` before torch is loaded.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Self

import sentencepiece
from pydantic import NonNegativeInt, PositiveInt, ValidationError

from megatron_kosmos.config.base import StrictModel
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.prompt import BOS, END_OF_IMAGE, EOS, IMAGE, LINE, PAD, UNK

MODEL_FILE = "tokenizer.model"
SETTINGS_FILE = "kosmos_tokenizer.json"
REQUIRED_TOKENS = (PAD, BOS, EOS, UNK, IMAGE, END_OF_IMAGE)
FOREIGN_MODEL_FILES = ("spiece.model", "sentencepiece.bpe.model")

Newlines = Literal["line", "collapse"]


class TokenizerSettings(StrictModel):
    """`kosmos_tokenizer.json`: how ids follow from the pieces of the sentencepiece model."""

    format: Literal[1] = 1
    vocab_size: PositiveInt
    """Ids 0 … vocab_size - 1 exist, special tokens included."""
    special_tokens: dict[str, NonNegativeInt]
    """Id of each special token; `<s>` and `</s>` may share one."""
    piece_offset: NonNegativeInt = 0
    """Id of an ordinary piece minus its number in the sentencepiece model: 1 in XLM-R's fairseq numbering."""
    newlines: Newlines
    """`line` writes a newline as `</line>` and reads it back; `collapse` makes it a space."""

    def fingerprint_with(self, model: bytes) -> str:
        """Return the sha256 (hexadecimal) of the settings and of `model`, the bytes of the sentencepiece model."""
        settings = json.dumps(self.model_dump(), sort_keys=True).encode()
        return hashlib.sha256(settings + b"\n" + model).hexdigest()


class _StoredSettings(TokenizerSettings):
    fingerprint: str


class KosmosTokenizer:
    """Text to ids and back. `<image>` inside a text stays text: image markers are inserted as ids only."""

    def __init__(self, model: bytes, settings: TokenizerSettings, origin: str) -> None:
        """Take the bytes of a sentencepiece `model`; `origin` names it in errors.

        Raises DataError when the model does not load or a special token is missing.
        """
        missing = [token for token in REQUIRED_TOKENS if token not in settings.special_tokens]
        if settings.newlines == "line" and LINE not in settings.special_tokens:
            missing.append(LINE)
        if missing:
            raise DataError(
                f"the tokenizer {origin} lacks {' '.join(missing)}; make one that has them with "
                f"`kosmos tokenizer import MODEL --output FOLDER` or `kosmos tokenizer train`"
            )
        self._model = model
        self._pieces = load_pieces(model, origin)
        self.settings = settings
        self.fingerprint = settings.fingerprint_with(model)
        """sha256 (hexadecimal) that prepared corpora record, so that another tokenizer is refused."""
        self.vocab_size = settings.vocab_size
        tokens = settings.special_tokens
        self.pad_id, self.bos_id, self.eos_id, self.unk_id = (tokens[token] for token in (PAD, BOS, EOS, UNK))
        self.image_id, self.end_of_image_id = tokens[IMAGE], tokens[END_OF_IMAGE]
        self.line_id = tokens[LINE] if settings.newlines == "line" else None
        self._names = {number: name for name, number in reversed(tokens.items())}  # of two names the first counts

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the folder `path`. Raises DataError when it is not a tokenizer, was changed or lacks a token."""
        settings_path = Path(path) / SETTINGS_FILE
        try:
            stored = _StoredSettings.model_validate_json(settings_path.read_bytes())
            model = (Path(path) / MODEL_FILE).read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(_not_a_tokenizer(Path(path), error)) from error
        except ValidationError as error:
            raise DataError(f"{settings_path} is damaged; make the tokenizer again: {error}") from error
        settings = TokenizerSettings.model_validate(stored.model_dump(exclude={"fingerprint"}))
        tokenizer = cls(model, settings, str(path))
        if tokenizer.fingerprint != stored.fingerprint:
            raise DataError(
                f"{path}: {MODEL_FILE} or {SETTINGS_FILE} was changed after the tokenizer was made (fingerprint "
                f"{tokenizer.fingerprint[:12]}…, recorded {stored.fingerprint[:12]}…); make the tokenizer again"
            )
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without `<s>` and `</s>`. Newlines follow the recorded policy.

        Raises UnicodeEncodeError for a text with lone surrogates.
        """
        if self.line_id is None:
            return self._encode_line(text.replace("\n", " "))
        first, *rest = text.split("\n")
        ids = self._encode_line(first)
        for line in rest:
            ids.append(self.line_id)
            ids += self._encode_line(line)
        return ids

    def _encode_line(self, line: str) -> list[int]:
        try:
            pieces = self._pieces.encode(line)
        except RuntimeError:
            line.encode("utf-8")  # a lone surrogate: this says which; sentencepiece only that it cannot cast
            raise
        offset = self.settings.piece_offset
        unknown = self._pieces.unk_id()
        if offset == 0 and unknown == self.unk_id:
            return pieces
        return [self.unk_id if piece == unknown else piece + offset for piece in pieces]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Return the text of `ids`; `</line>` becomes a newline, other special tokens vanish or keep their names.

        Raises DataError for an id outside the vocabulary.
        """
        text: list[str] = []
        run: list[int] = []
        offset = self.settings.piece_offset
        for number in map(int, ids):
            if not 0 <= number < self.vocab_size:
                raise DataError(f"id {number} is outside the vocabulary of {self.vocab_size}")
            if number not in self._names:
                run.append(number - offset)
                continue
            text.append(self._pieces.decode(run))
            run = []
            if number == self.line_id:
                text.append("\n")
            elif not skip_special:
                text.append(self._names[number])
        text.append(self._pieces.decode(run))
        return "".join(text)

    def save(self, folder: Path) -> None:
        """Write the tokenizer to `folder`, which is made if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        stored = _StoredSettings(**self.settings.model_dump(), fingerprint=self.fingerprint)
        (folder / MODEL_FILE).write_bytes(self._model)
        (folder / SETTINGS_FILE).write_text(stored.model_dump_json(indent=2) + "\n", encoding="utf-8")


def load_pieces(model: bytes, origin: str) -> sentencepiece.SentencePieceProcessor:
    """Return a processor of the serialized `model`. Raises DataError when it is not a sentencepiece model."""
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise DataError(f"{origin} holds no sentencepiece model: {error}") from error
    return pieces


def _not_a_tokenizer(folder: Path, error: OSError) -> str:
    if folder.suffix == ".model" or any((folder / name).exists() for name in FOREIGN_MODEL_FILES):
        return (
            f"{folder} is a sentencepiece model without {IMAGE}; run `kosmos tokenizer import {folder} --output FOLDER`"
        )
    return (
        f"no tokenizer at {folder} ({error.filename} is missing); "
        f"make one with `kosmos tokenizer train` or `kosmos tokenizer import`"
    )
