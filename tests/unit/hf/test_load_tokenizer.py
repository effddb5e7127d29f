"""The exported byte-level tokenizer: transformers' own class with the ids and texts of training, whatever the text."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from megatron_kosmos.hf.load_tokenizer import exported_tokenizer, training_tokenizer
from megatron_kosmos.hf.tokenization_kosmos import KosmosHFTokenizer

KINDS = ["byte_bpe", "falcon", "gpt2"]
TEXTS = [
    "An image of",
    "two\nlines\n\n\n and more\n",
    "  spaces   inside , before . punctuation 's and n't at the end  ",
    "special words: <image> </image> <s> </s> <pad> <unk> </line> <|endoftext|> >>TITLE<<",
    "☃ 漢字 🙂 \x00 ﬁ ½\r\n\t",
    "",
    "\n",
]


@pytest.fixture(params=["fresh", "saved"])
def is_saved(request: pytest.FixtureRequest) -> bool:
    """Whether the tokenizer went through an exported folder."""
    return bool(request.param == "saved")


def both(folder: Path, exported: Path | None = None) -> tuple[KosmosTokenizer, PreTrainedTokenizerBase]:
    tokenizer = training_tokenizer(folder)
    if exported is not None:
        tokenizer.save_pretrained(exported)
        tokenizer = exported_tokenizer(exported)
    assert type(tokenizer) is PreTrainedTokenizerFast
    return KosmosTokenizer.load(folder), tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_those_of_training(
    kind: str, is_saved: bool, tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    ours, exported = both(tokenizers[kind], tmp_path if is_saved else None)
    for text in TEXTS:
        ids = ours.encode(text)
        assert exported(text, add_special_tokens=False)["input_ids"] == ids
        assert exported(text)["input_ids"] == [ours.bos_id, *ids]
        assert set(exported(text)) == {"input_ids", "attention_mask"}
        assert exported.decode(ids) == exported.decode([ours.bos_id, *ids], skip_special_tokens=True) == text
    everything = list(range(ours.vocab_size))
    for skip in (True, False):
        assert exported.decode(everything, skip_special_tokens=skip) == ours.decode(everything, skip_special=skip)
    assert exported.padding_side == "left"
    assert len(exported) == ours.vocab_size


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(alphabet=st.characters(codec="utf-8")) | st.text(alphabet="<>|/simageldofxt \n"))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_has_the_ids_of_training(kind: str, tokenizers: dict[str, Path], text: str) -> None:
    ours, exported = both(tokenizers[kind])
    ids = exported(text, add_special_tokens=False)["input_ids"]
    assert ids == ours.encode(text)
    assert set(ours.settings.special_tokens.values()).isdisjoint(ids)
    assert exported.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_special_ids_are_known_by_name(kind: str, is_saved: bool, tokenizers: dict[str, Path], tmp_path: Path) -> None:
    ours, exported = both(tokenizers[kind], tmp_path if is_saved else None)
    names = ("pad", "bos", "eos", "unk", "image", "end_of_image")
    for name in names:
        assert getattr(exported, f"{name}_token_id") == getattr(ours, f"{name}_id")
    assert exported("a<image>", split_special_tokens=False)["input_ids"][-1] == ours.image_id


def test_auto_tokenizer_takes_the_stock_class(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    _, exported = both(tokenizers["falcon"], tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(exported)
    assert loaded(TEXTS[3])["input_ids"] == exported(TEXTS[3])["input_ids"]


def test_sentencepiece_tokenizers_keep_their_class(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = training_tokenizer(tokenizers["t5"])
    tokenizer.save_pretrained(tmp_path)
    assert type(tokenizer) is type(exported_tokenizer(tmp_path)) is KosmosHFTokenizer
