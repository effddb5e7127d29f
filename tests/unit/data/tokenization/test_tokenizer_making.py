"""Training is deterministic; imported T5 and XLM-R models keep the ids that transformers gives them."""

import io
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

import pytest
import sentencepiece
from transformers import T5Tokenizer, XLMRobertaTokenizer

from megatron_kosmos.data.errors import BadDocument, DataError
from megatron_kosmos.data.sources.documents import read_texts
from megatron_kosmos.data.tokenization.making import TrainingSettings, find_model, import_tokenizer, train_tokenizer
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer

LINES = [line for text in list(topics.values())[:20] for line in text.split("\n") if line.strip()]
SENTENCE = "The value of  a name 日 is 3.14, <image> or None!"


@pytest.fixture(scope="module")
def foreign_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a folder with a small model that has the special pieces of T5's or XLM-R's."""
    pieces: dict[str, dict[str, Any]] = {
        "spiece.model": {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
        "sentencepiece.bpe.model": {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1},
    }

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("foreign")
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES), model_writer=model, vocab_size=300, minloglevel=2, **pieces[name]
        )
        (folder / name).write_bytes(model.getvalue())
        return folder

    return make


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_training_twice_gives_the_same_tokenizer(model_type: str) -> None:
    assert model_type in ("unigram", "bpe")
    settings = TrainingSettings(350, model_type=model_type)  # type: ignore[arg-type]
    first, second = (train_tokenizer(LINES, settings) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert first.vocab_size == 350
    assert first.decode(first.encode(SENTENCE)) == SENTENCE


def test_too_little_text_for_the_vocabulary() -> None:
    with pytest.raises(DataError, match=r"cannot train 5000 pieces.*smaller vocabulary"):
        train_tokenizer(["a few words"], TrainingSettings(5000))


@pytest.mark.parametrize("model_type", ["unigram", "bpe", "byte-bpe"])
def test_a_bad_document_is_told_as_it_is(
    model_type: Literal["unigram", "bpe", "byte-bpe"], write_lines: Callable[..., Path]
) -> None:
    file = write_lines("a.jsonl", ['{"text": "good"}', "{"])
    with pytest.raises(BadDocument, match=r"a\.jsonl:2: Invalid JSON: .* \[invalid_json\]$"):
        train_tokenizer(read_texts(file), TrainingSettings(vocab_size=300, model_type=model_type))


def test_t5_with_one_end_and_begin_token(foreign_model: Callable[[str], Path]) -> None:
    """As Kosmos-X: T5's pieces plus <image> </image>, 32,000 + 2 at T5's size."""
    folder = foreign_model("spiece.model")
    ours = import_tokenizer(folder, bos_is_eos=True)
    theirs = T5Tokenizer.from_pretrained(folder, extra_ids=0)
    assert ours.vocab_size == 302
    assert ours.bos_id == ours.eos_id == theirs.eos_token_id == 1
    assert (ours.pad_id, ours.unk_id) == (theirs.pad_token_id, theirs.unk_token_id)
    assert (ours.image_id, ours.end_of_image_id) == (300, 301)
    assert ours.encode(SENTENCE) == theirs.encode(SENTENCE, add_special_tokens=False)
    assert ours.decode([ours.bos_id, *ours.encode("two words")], skip_special=False) == "</s>two words"


def test_t5_with_a_begin_token_of_its_own(foreign_model: Callable[[str], Path]) -> None:
    ours = import_tokenizer(foreign_model("spiece.model") / "spiece.model", newlines="line")
    assert (ours.bos_id, ours.image_id, ours.end_of_image_id, ours.line_id) == (300, 301, 302, 303)
    assert ours.vocab_size == 304
    assert ours.decode(ours.encode("two\n\nlines")) == "two\n\nlines"


def test_xlm_r_in_fairseq_numbers(foreign_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = foreign_model("sentencepiece.bpe.model")
    ours = import_tokenizer(folder)
    theirs = XLMRobertaTokenizer.from_pretrained(folder)
    assert (ours.bos_id, ours.pad_id, ours.eos_id, ours.unk_id) == (0, 1, 2, 3)
    assert ours.settings.special_tokens["<mask>"] == theirs.mask_token_id == 301
    assert ours.vocab_size == len(theirs) + 2 == 304
    ids = ours.encode(SENTENCE)
    assert ids == theirs.encode(SENTENCE, add_special_tokens=False)
    assert ours.unk_id in ids
    ours.save(tmp_path)
    loaded = KosmosTokenizer.load(tmp_path)
    assert loaded.decode(loaded.encode("two words")) == "two words"


def test_the_same_file_in_plain_numbers(foreign_model: Callable[[str], Path]) -> None:
    ours = import_tokenizer(foreign_model("sentencepiece.bpe.model"), numbering="plain")
    assert (ours.unk_id, ours.bos_id, ours.eos_id, ours.pad_id, ours.image_id) == (0, 1, 2, 300, 301)


def test_what_cannot_be_imported(tmp_path: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(DataError, match=r"neither a tokenizer's file nor a folder with spiece\.model"):
        find_model(tmp_path)
    with pytest.raises(DataError, match="already a tokenizer of megatron_kosmos"):
        find_model(tokenizer_folder)
    (tmp_path / "spiece.model").write_bytes(b"")
    with pytest.raises(DataError, match="holds no sentencepiece model"):
        import_tokenizer(tmp_path)
