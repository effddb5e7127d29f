"""Making tokenizers: training one on text, or importing a T5, XLM-R, Falcon or other model.

An imported model keeps its ids; the special tokens that it lacks get the ids after its vocabulary.
"""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sentencepiece

from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.tokenization.fast_making import import_fast, train_byte_bpe
from megatron_kosmos.data.tokenization.sentencepiece_backend import load_pieces
from megatron_kosmos.data.tokenization.settings import MODEL_FILES, SETTINGS_FILE, Newlines, TokenizerSettings
from megatron_kosmos.data.tokenization.tokenizer import FOREIGN_MODEL_FILES, KosmosTokenizer
from megatron_kosmos.prompt import BOS, END_OF_IMAGE, EOS, IMAGE, LINE, PAD, SPECIAL_TOKENS, UNK

Numbering = Literal["plain", "fairseq"]


CHARACTER_COVERAGE = 0.9995
"""Share of the characters that get pieces of their own; the rest is written in bytes."""
MAX_LINES = 10_000_000
"""Lines that sentencepiece trains on, the first of a larger text."""


@dataclass(frozen=True)
class TrainingSettings:
    """How a tokenizer is trained: unigram and bpe by sentencepiece, byte-bpe (as GPT-2's) by tokenizers."""

    vocab_size: int
    """Ids of the result, the seven special tokens and 256 bytes included."""
    model_type: Literal["unigram", "bpe", "byte-bpe"] = "unigram"
    newlines: Newlines | None = None
    """None is `line` for sentencepiece and `keep`, the only choice there is, for byte-bpe."""
    num_threads: int = 16
    """Threads of sentencepiece's trainer. Part of the result: sums in another order may choose other pieces."""


def train_tokenizer(texts: Iterable[str], settings: TrainingSettings) -> KosmosTokenizer:
    """Train on `texts`, with the special tokens of `prompt.SPECIAL_TOKENS` at ids 0 … 6.

    Nothing is normalized, so that double spaces and indentation survive, and a character without a piece is written in
    bytes, so that every text decodes to itself. Raises DataError when the text is too small for the vocabulary, and
    that which `texts` raises.
    """
    if settings.model_type == "byte-bpe":
        _refuse_unless(settings.newlines in {None, "keep"}, settings.newlines, "byte-bpe", "keep")
        return train_byte_bpe(texts, settings.vocab_size)
    newlines = settings.newlines or "line"
    _refuse_unless(newlines != "keep", newlines, settings.model_type, "line or collapse")
    model, problems = io.BytesIO(), list[DataError]()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts, problems),
            model_writer=model,
            vocab_size=settings.vocab_size,
            model_type=settings.model_type,
            character_coverage=CHARACTER_COVERAGE,
            num_threads=settings.num_threads,
            input_sentence_size=MAX_LINES,
            shuffle_input_sentence=False,
            max_sentence_length=1 << 20,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece=PAD,
            bos_piece=BOS,
            eos_piece=EOS,
            unk_piece=UNK,
            control_symbols=[IMAGE, END_OF_IMAGE, LINE],
            minloglevel=2,
        )
    except RuntimeError as error:
        if problems:
            raise problems[0] from None
        raise DataError(
            f"sentencepiece cannot train {settings.vocab_size} pieces: {error}. Give more text or a smaller vocabulary"
        ) from error
    tokens = {token: number for number, token in enumerate(SPECIAL_TOKENS)}
    described = TokenizerSettings(vocab_size=settings.vocab_size, special_tokens=tokens, newlines=newlines)
    return KosmosTokenizer(model.getvalue(), described, "trained")


def _lines(texts: Iterable[str], problems: list[DataError]) -> Iterable[str]:
    """Yield the lines of `texts`; an error goes to `problems` too, since the trainer makes a RuntimeError of it."""
    try:
        for text in texts:
            for line in text.split("\n"):
                if line.strip():
                    yield line
    except DataError as error:
        problems.append(error)
        raise


def _refuse_unless(is_legal: bool, newlines: Newlines | None, kind: str, legal: str) -> None:
    if not is_legal:
        raise DataError(f"newlines={newlines} is not to be had with {kind}, only {legal}; leave --newlines out")


def find_model(path: Path) -> Path:
    """Return the sentencepiece model or tokenizer.json that `path`, a file or a folder, means. Raises DataError."""
    if path.is_file():
        return path
    if (path / SETTINGS_FILE).exists():
        raise DataError(f"{path} is already a tokenizer of megatron_kosmos; use it as it is")
    names = (*FOREIGN_MODEL_FILES, *MODEL_FILES.values())  # a sentencepiece model rather than what was made from it
    for name in names:
        if (path / name).is_file():
            return path / name
    raise DataError(f"{path} is neither a tokenizer's file nor a folder with {', '.join(names)}")


def import_tokenizer(
    path: Path, newlines: Newlines | None = None, bos_is_eos: bool = False, numbering: Numbering | None = None
) -> KosmosTokenizer:
    """Take over the sentencepiece model or tokenizer.json at `path`, a file or a Hugging Face folder, and add what it
    lacks.

    `newlines` None is `collapse` for sentencepiece and `keep`, the only choice there is, for a tokenizer.json.
    `bos_is_eos` lets `</s>` begin documents too, for T5, which has no `<s>`: its 32,000 pieces then become 32,002 with
    `<image>` and `</image>`. `numbering` is fairseq's for XLM-R, where id = piece + 1 but for four swapped specials
    (transformers' XLMRobertaTokenizer); None takes it for a file of XLM-R's name, `sentencepiece.bpe.model`.
    """
    file = find_model(path)
    if file.suffix == ".json":
        _refuse_unless(newlines in {None, "keep"}, newlines, "a tokenizer.json", "keep")
        return import_fast(file, bos_is_eos)
    newlines = newlines or "collapse"
    _refuse_unless(newlines != "keep", newlines, "a sentencepiece model", "line or collapse")
    model = file.read_bytes()
    pieces = load_pieces(model, str(file))
    if numbering is None:
        numbering = "fairseq" if file.name == "sentencepiece.bpe.model" else "plain"
    if numbering == "fairseq":
        offset, size = 1, pieces.get_piece_size() + 2  # the shift, and <mask> at the end
        tokens = {BOS: 0, PAD: 1, EOS: 2, UNK: 3, "<mask>": size - 1}
    else:
        offset, size = 0, pieces.get_piece_size()
        known = {PAD: pieces.pad_id(), BOS: pieces.bos_id(), EOS: pieces.eos_id(), UNK: pieces.unk_id()}
        tokens = {token: number for token, number in known.items() if number >= 0}
        if EOS not in tokens:
            raise DataError(f"{file} has no end-of-text piece; is it a language model's tokenizer?")
    if bos_is_eos:
        tokens.setdefault(BOS, tokens[EOS])
    for token in (PAD, BOS, IMAGE, END_OF_IMAGE, *([LINE] if newlines == "line" else [])):
        if token not in tokens:
            tokens[token] = size
            size += 1
    settings = TokenizerSettings(vocab_size=size, special_tokens=tokens, piece_offset=offset, newlines=newlines)
    return KosmosTokenizer(model, settings, str(file))
