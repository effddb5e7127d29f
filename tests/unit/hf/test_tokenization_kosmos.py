"""The exported tokenizer: the ids and texts of the training tokenizer, whatever the text."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from megatron_kosmos.hf.tokenization_kosmos import KosmosHFTokenizer

KINDS = ["trained", "t5", "xlm_roberta", "shadowed"]
TEXTS = [
    "An image of",
    "two\nlines\n\n\n and more\n",
    "  spaces   inside  and at the end  ",
    "special words: <image> </image> <s> </s> <pad> <unk> </line> <mask> <0x41>",
    "unknown: ☃ 漢字 🙂 \x00 ﬁ ½",
    "",
    " ",
    "\n",
    "\r\n\t tabs",
]


def both(folder: Path) -> tuple[KosmosTokenizer, KosmosHFTokenizer]:
    return KosmosTokenizer.load(folder), KosmosHFTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_those_of_training(kind: str, tokenizers: dict[str, Path]) -> None:
    ours, exported = both(tokenizers[kind])
    for text in TEXTS:
        ids = ours.encode(text)
        assert exported(text, add_special_tokens=False)["input_ids"] == ids
        assert exported(text)["input_ids"] == [ours.bos_id, *ids]
        for skip in (True, False):
            assert exported.decode(ids, skip_special_tokens=skip) == ours.decode(ids, skip_special=skip)
    everything = list(range(ours.vocab_size))
    for skip in (True, False):
        assert exported.decode(everything, skip_special_tokens=skip) == ours.decode(everything, skip_special=skip)


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(alphabet=st.characters(codec="utf-8")) | st.text(alphabet="<>/simagelnepdu \n▁é"))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_has_the_ids_of_training(kind: str, tokenizers: dict[str, Path], text: str) -> None:
    ours, exported = both(tokenizers[kind])
    ids = exported(text, add_special_tokens=False)["input_ids"]
    assert ids == ours.encode(text)
    assert not {ours.bos_id, ours.eos_id, ours.image_id, ours.end_of_image_id, ours.pad_id} & set(ids)
    assert exported.decode(ids, skip_special_tokens=True) == ours.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_special_ids_are_known_by_name(kind: str, tokenizers: dict[str, Path]) -> None:
    ours, exported = both(tokenizers[kind])
    assert (exported.pad_token_id, exported.bos_token_id, exported.eos_token_id, exported.unk_token_id) == (
        ours.pad_id,
        ours.bos_id,
        ours.eos_id,
        ours.unk_id,
    )
    assert (exported.image_token_id, exported.end_of_image_token_id) == (ours.image_id, ours.end_of_image_id)
    assert exported.vocab_size == len(exported) == ours.vocab_size
    assert sorted(exported.get_vocab().values()) == list(range(ours.vocab_size))


def test_special_tokens_in_the_text_count_only_when_asked_for(tokenizers: dict[str, Path]) -> None:
    ours, exported = both(tokenizers["trained"])
    assert ours.eos_id not in exported("end</s>")["input_ids"]
    assert exported("end</s>", split_special_tokens=False)["input_ids"][-1] == ours.eos_id


def test_ids_without_a_token_are_left_out(tokenizers: dict[str, Path]) -> None:
    ours, exported = both(tokenizers["trained"])
    ids = ours.encode("a cat")
    assert exported.decode([ids[0], ours.vocab_size + 3, *ids[1:]]) == "a cat"


def test_saving_keeps_the_two_files_and_the_ids(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    _, exported = both(tokenizers["t5"])
    exported.save_pretrained(tmp_path)
    for name in ("tokenizer.model", "kosmos_tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (tokenizers["t5"] / name).read_bytes()
    again = KosmosHFTokenizer.from_pretrained(tmp_path)
    assert KosmosTokenizer.load(tmp_path).encode(TEXTS[0]) == again(TEXTS[0], add_special_tokens=False)["input_ids"]
    assert again.padding_side == "left"


def test_added_tokens_get_ids_past_the_vocabulary(tokenizers: dict[str, Path]) -> None:
    ours, exported = both(tokenizers["trained"])
    assert exported.add_tokens(["<box>"]) == 1
    ids = exported("a<box>cat", split_special_tokens=False)["input_ids"]
    assert ours.vocab_size in ids
    assert "<box>" in exported.decode(ids)
