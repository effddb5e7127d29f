"""The tokenizer: a model of one of two libraries and special tokens that text can never produce.

A tokenizer is a folder with `kosmos_tokenizer.json` (`TokenizerSettings`) and the model: `tokenizer.model` for
sentencepiece, `tokenizer.json` for Hugging Face's tokenizers. No torch: the configuration check reads `vocab_size`
before torch is loaded.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from megatron_kosmos.data.arrays import Int32Array, Int64Array
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.tokenization.fast_backend import FastBackend
from megatron_kosmos.data.tokenization.sentencepiece_backend import SentencePieceBackend
from megatron_kosmos.data.tokenization.settings import MODEL_FILES, SETTINGS_FILE, TokenizerSettings
from megatron_kosmos.prompt import BOS, END_OF_IMAGE, EOS, IMAGE, LINE, PAD, UNK

REQUIRED_TOKENS = (PAD, BOS, EOS, UNK, IMAGE, END_OF_IMAGE)
FOREIGN_MODEL_FILES = ("spiece.model", "sentencepiece.bpe.model")


class _StoredSettings(TokenizerSettings):
    fingerprint: str


class KosmosTokenizer:
    """Text to ids and back. `<image>` inside a text stays text: image markers are inserted as ids only."""

    def __init__(self, model: bytes, settings: TokenizerSettings, origin: str) -> None:
        """Take the bytes of the model's file; `origin` names it in errors.

        Raises DataError when the model does not load or a special token is missing.
        """
        _refuse_without_tokens(settings, origin)
        self._model = model
        self._backend: SentencePieceBackend | FastBackend = (
            FastBackend(model, origin)
            if settings.backend == "tokenizers"
            else SentencePieceBackend(model, settings, origin)
        )
        self.settings = settings
        self.fingerprint = settings.fingerprint_with(model)
        """sha256 (hexadecimal) that prepared corpora record, so that another tokenizer is refused."""
        self.vocab_size = settings.vocab_size
        tokens = settings.special_tokens
        self.pad_id, self.bos_id, self.eos_id, self.unk_id = (tokens[token] for token in (PAD, BOS, EOS, UNK))
        self.image_id, self.end_of_image_id = tokens[IMAGE], tokens[END_OF_IMAGE]
        self.line_id = tokens[LINE] if settings.newlines == "line" else None

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the folder `path`. Raises DataError when it is not a tokenizer, was changed or lacks a token."""
        settings_path = Path(path) / SETTINGS_FILE
        try:
            stored = _StoredSettings.model_validate_json(settings_path.read_bytes())
            model = (Path(path) / MODEL_FILES[stored.backend]).read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(_not_a_tokenizer(Path(path), error)) from error
        except ValidationError as error:
            raise DataError(f"{settings_path} is damaged; make the tokenizer again: {error}") from error
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
        settings = TokenizerSettings.model_validate(stored.model_dump(exclude={"fingerprint"}))
        _refuse_without_tokens(settings, str(path))
        fingerprint = settings.fingerprint_with(model)
        if fingerprint != stored.fingerprint:  # compared first: no library has to cope with a damaged model
            raise DataError(
                f"{path}: {MODEL_FILES[settings.backend]} or {SETTINGS_FILE} was changed after the tokenizer was made "
                f"(fingerprint {fingerprint[:12]}…, recorded {stored.fingerprint[:12]}…); "
                f"make the tokenizer again"
            )
        return cls(model, settings, str(path))

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without `<s>` and `</s>`. Newlines follow the recorded policy.

        Raises UnicodeEncodeError for a text with lone surrogates.
        """
        ids: list[int] = self.encode_all([text])[0].tolist()
        return ids

    def encode_all(self, texts: Sequence[str]) -> tuple[Int32Array, Int64Array]:
        """Return the ids of all `texts`, one after the other, and how many of them each text has.

        They are those that `encode` gives, in half the time. Raises UnicodeEncodeError for a text with lone surrogates.
        """
        return self._backend.encode(texts)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Return the text of `ids`; `</line>` becomes a newline, other special tokens vanish or keep their names.

        Raises DataError for an id outside the vocabulary.
        """
        numbers = [int(number) for number in ids]
        for number in numbers:
            if not 0 <= number < self.vocab_size:
                raise DataError(f"id {number} is outside the vocabulary of {self.vocab_size}")
        return self._backend.decode(numbers, skip_special)

    def piece(self, number: int) -> str:
        """Return the token `number` as the model writes it, spaces marked. Raises DataError outside the vocabulary."""
        if not 0 <= number < self.vocab_size:
            raise DataError(f"id {number} is outside the vocabulary of {self.vocab_size}")
        return self._backend.piece(number)

    def save(self, folder: Path) -> None:
        """Write the tokenizer to `folder`, which is made if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        stored = _StoredSettings(**self.settings.model_dump(), fingerprint=self.fingerprint)
        (folder / MODEL_FILES[self.settings.backend]).write_bytes(self._model)
        (folder / SETTINGS_FILE).write_text(stored.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _refuse_without_tokens(settings: TokenizerSettings, origin: str) -> None:
    missing = [token for token in REQUIRED_TOKENS if token not in settings.special_tokens]
    if settings.newlines == "line" and LINE not in settings.special_tokens:
        missing.append(LINE)
    if missing:
        raise DataError(
            f"the tokenizer {origin} lacks {' '.join(missing)}; make one that has them with "
            f"`kosmos tokenizer import MODEL --output FOLDER` or `kosmos tokenizer train`"
        )


def _not_a_tokenizer(folder: Path, error: OSError) -> str:
    if folder.suffix == ".model" or any((folder / name).exists() for name in FOREIGN_MODEL_FILES):
        return (
            f"{folder} is a sentencepiece model without {IMAGE}; run `kosmos tokenizer import {folder} --output FOLDER`"
        )
    if folder.suffix == ".json" or (folder / MODEL_FILES["tokenizers"]).exists():
        return (
            f"{folder} is a Hugging Face tokenizer without {SETTINGS_FILE}; "
            f"run `kosmos tokenizer import {folder} --output FOLDER`"
        )
    return (
        f"no tokenizer at {folder} ({error.filename} is missing); "
        f"make one with `kosmos tokenizer train` or `kosmos tokenizer import`"
    )
