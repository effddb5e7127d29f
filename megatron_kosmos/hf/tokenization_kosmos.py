"""The training tokenizer for transformers: a sentencepiece model and special tokens that text can never produce.

Exported folders carry this file: it imports nothing but sentencepiece and transformers. It reads the two files of a
megatron_kosmos tokenizer folder and gives the same ids.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import PreTrainedTokenizer

SPECIAL_TOKENS = {
    "pad_token": "<pad>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "image_token": "<image>",
    "end_of_image_token": "</image>",
}
LINE = "</line>"
"""Stands for a newline, where the tokenizer has one."""


class KosmosHFTokenizer(PreTrainedTokenizer):
    """Text to `<s>` and pieces, and back; `<image>` or `</s>` inside a text stays text.

    `split_special_tokens=False` in a call lets special tokens be written in the text instead.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model", "settings_file": "kosmos_tokenizer.json"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"  # Generation goes on from the last position.

    def __init__(self, vocab_file: str, settings_file: str, **kwargs: Any) -> None:
        self.vocab_file, self.settings_file = vocab_file, settings_file
        settings = json.loads(Path(settings_file).read_text(encoding="utf-8"))
        self._pieces = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        self._size: int = settings["vocab_size"]
        self._offset: int = settings["piece_offset"]
        self._special: dict[str, int] = settings["special_tokens"]
        self._names = {number: name for name, number in reversed(self._special.items())}  # of two the first counts
        self._line_id = self._special[LINE] if settings["newlines"] == "line" else None
        alike = {self._pieces.piece_to_id(name) for name in self._special} - {self._pieces.unk_id()}
        # Pieces that read like a special token without being it go by their number.
        self._look_alikes = {
            f"<piece {piece}>": piece + self._offset for piece in alike if piece + self._offset not in self._names
        }
        self._look_alike_names = {number: name for name, number in self._look_alikes.items()}
        kwargs.setdefault("split_special_tokens", True)
        for role, name in SPECIAL_TOKENS.items():
            kwargs.setdefault(role, self._names[self._special[name]])  # `<s>` may be another name of `</s>`
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """Ids 0 … vocab_size - 1 exist, special tokens included."""
        return self._size

    def get_vocab(self) -> dict[str, int]:
        """Return every token's id."""
        return {self._convert_id_to_token(number): number for number in range(self._size)} | self.added_tokens_encoder

    def _encode_text(self, text: str) -> list[int]:
        if self._line_id is None:
            return self._encode_line(text.replace("\n", " "))
        first, *rest = text.split("\n")
        ids = self._encode_line(first)
        for line in rest:
            ids += [self._line_id, *self._encode_line(line)]
        return ids

    def _encode_line(self, line: str) -> list[int]:
        unknown, unknown_id = self._pieces.unk_id(), self._special["<unk>"]
        return [unknown_id if piece == unknown else piece + self._offset for piece in self._pieces.encode(line)]

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        # By way of the ids: the surface of an unknown piece could read like a special token.
        return [self._convert_id_to_token(number) for number in self._encode_text(text)]

    def _convert_token_to_id(self, token: str) -> int:
        for named in (self._special, self._look_alikes):
            if token in named:
                return named[token]
        piece = self._pieces.piece_to_id(token)
        return self._special["<unk>"] if piece == self._pieces.unk_id() else piece + self._offset

    def _convert_id_to_token(self, index: int) -> str:
        for names in (self._names, self._look_alike_names):
            if index in names:
                return names[index]
        piece = index - self._offset
        return self._pieces.id_to_piece(piece) if 0 <= piece < self._pieces.get_piece_size() else "<unk>"

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the text of `tokens`, special tokens by name."""
        return self._decode([self._convert_token_to_id_with_added_voc(token) for token in tokens])

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Put `<s>` before one text, or before each of two."""
        second = [] if token_ids_1 is None else [self.bos_token_id, *token_ids_1]
        return [self.bos_token_id, *token_ids_0, *second]

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, **kwargs: Any) -> str:
        """Return the text of `token_ids`; `</line>` becomes a newline, ids without a token are left out."""
        text: list[str] = []
        run: list[int] = []
        for number in [token_ids] if isinstance(token_ids, int) else token_ids:
            piece = number - self._offset
            is_added = number >= self._size and number in self._added_tokens_decoder
            if number not in self._names and not is_added:
                run += [piece] if 0 <= piece < self._pieces.get_piece_size() else []
                continue
            text.append(self._pieces.decode(run))
            run = []
            if number == self._line_id:
                text.append("\n")
            elif is_added or not skip_special_tokens:
                text.append(self._names.get(number) or str(self._added_tokens_decoder[number]))
        text.append(self._pieces.decode(run))
        return "".join(text)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Copy the two tokenizer files to `save_directory` and return their paths."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        saved = []
        for source, name in zip((self.vocab_file, self.settings_file), self.vocab_files_names.values(), strict=True):
            target = Path(save_directory) / (prefix + name)
            if target.resolve() != Path(source).resolve():
                shutil.copyfile(source, target)
            saved.append(str(target))
        return tuple(saved)


__all__ = ["KosmosHFTokenizer"]
