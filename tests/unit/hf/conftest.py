"""Tokenizer folders of every kind that training can meet, made once."""

import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from megatron_kosmos.data.tokenization.making import TrainingSettings, import_tokenizer, train_tokenizer
from tests.unit.data.tokenization.foreign_tokenizers import falcon_like, gpt2_like

TEXT = [
    "An image of a handwritten seven.\nIt has two strokes, <image> or </s> written as text.",
    "Question: what is it? Answer: a cat, a dog, the sea at night.\n\n  Indented lines, double  spaces.",
    "Numbers 0 1 2 3 4 5 6 7 8 9, brackets [x] {y} <z>, quotes ' and \", unicode é ü ß.",
] * 5


def _pieces(options: dict[str, Any]) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, vocab_size=80, minloglevel=2, **options
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return folders by name: trained by us, imported models of T5's, XLM-R's and an awkward kind, and byte-level."""
    root = tmp_path_factory.mktemp("tokenizers")
    train_tokenizer(TEXT, TrainingSettings(vocab_size=340)).save(root / "trained")
    foreign: dict[str, tuple[str, dict[str, Any]]] = {
        "t5": ("spiece.model", {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}),
        "xlm_roberta": ("sentencepiece.bpe.model", {}),
        "shadowed": ("spiece.model", {"user_defined_symbols": ["<image>", "</line>"]}),
    }
    for name, (file, options) in foreign.items():
        path = root / f"{name}_source" / file
        path.parent.mkdir()
        path.write_bytes(_pieces(options))
        is_t5 = name == "t5"
        import_tokenizer(path, newlines="collapse" if is_t5 else "line", bos_is_eos=is_t5).save(root / name)
    train_tokenizer(TEXT, TrainingSettings(vocab_size=340, model_type="byte-bpe")).save(root / "byte_bpe")
    for name, make in {"falcon": falcon_like, "gpt2": gpt2_like}.items():
        import_tokenizer(make(root / f"{name}_source", TEXT, vocab_size=340)).save(root / name)
    return {name: root / name for name in ("trained", *foreign, "byte_bpe", "falcon", "gpt2")}
