"""The tokenizer gives text back as it was, never makes special tokens of it, and refuses what it was not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.tokenization.sentencepiece_backend import flattened
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from megatron_kosmos.prompt import SPECIAL_TOKENS

MULTILINGUAL = "Zażółć  gęślą jaźń\n\tこんにちは世界 — שלום 🎉\r\n  indented\n\n\x00end "
# sentencepiece writes a space as U+2581, so that this character alone comes back as a space.
texts = st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"]))


def test_special_tokens_are_where_prompt_says(tokenizer: KosmosTokenizer) -> None:
    assert list(tokenizer.settings.special_tokens) == list(SPECIAL_TOKENS)
    assert [tokenizer.settings.special_tokens[name] for name in SPECIAL_TOKENS] == list(range(7))
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert (tokenizer.image_id, tokenizer.end_of_image_id, tokenizer.line_id) == (4, 5, 6)
    assert tokenizer.vocab_size == 400


@given(text=texts)
def test_every_text_decodes_to_itself(tokenizer: KosmosTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(number >= 6 for number in ids)


@pytest.mark.parametrize("text", [MULTILINGUAL, "", " ", "\n", "a  b", " lead", "trail ", "\n\n x"])
def test_white_space_and_other_scripts_survive(tokenizer: KosmosTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("newlines", ["line", "collapse"])
def test_many_texts_at_once_are_encoded_as_sentencepiece_does_line_by_line(
    tokenizer: KosmosTokenizer, newlines: str
) -> None:
    settings = tokenizer.settings.model_copy(update={"newlines": newlines})
    ours = KosmosTokenizer(tokenizer._model, settings, "test")
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer._model)
    texts = [MULTILINGUAL, "", "\n", "the same\n\nthe same\n", "the same", *list(topics.values())[:3]]
    expected = []
    for text in texts:
        lines = text.split("\n") if newlines == "line" else [text.replace("\n", " ")]
        expected.append([number for line in lines for number in [*pieces.encode(line), 6]][:-1])
    ids, lengths = ours.encode_all(texts)
    assert [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] == expected
    assert [ours.encode(text) for text in texts] == expected
    assert [part.tolist() for part in ours.encode_all([])] == [[], []]


def test_special_tokens_in_a_text_stay_text(tokenizer: KosmosTokenizer) -> None:
    text = "".join(SPECIAL_TOKENS)
    ids = tokenizer.encode(text)
    assert set(ids).isdisjoint(range(7))
    assert tokenizer.decode(ids) == text


def test_newlines_are_tokens_or_spaces_as_recorded(tokenizer: KosmosTokenizer) -> None:
    assert tokenizer.encode("a\nb").count(6) == 1
    settings = tokenizer.settings.model_copy(update={"newlines": "collapse"})
    collapsing = KosmosTokenizer(tokenizer._model, settings, "test")
    assert collapsing.line_id is None
    assert collapsing.decode(collapsing.encode("a\nb")) == "a b"
    assert collapsing.fingerprint != tokenizer.fingerprint


def test_decode_names_or_skips_special_tokens(tokenizer: KosmosTokenizer) -> None:
    ids = [1, 4, 5, *tokenizer.encode("two words"), 2]
    assert tokenizer.decode(ids) == "two words"
    assert tokenizer.decode(ids, skip_special=False) == "<s><image></image>two words</s>"
    with pytest.raises(DataError, match="id 400 is outside the vocabulary of 400"):
        tokenizer.decode([400])


def test_a_lone_surrogate_is_named(tokenizer: KosmosTokenizer) -> None:
    with pytest.raises(UnicodeEncodeError, match="position 1"):
        tokenizer.encode("a\ud800b")


def test_no_tokenizer_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer at .*kosmos_tokenizer\.json is missing.*kosmos tokenizer train"):
        KosmosTokenizer.load(tmp_path)


def test_a_bare_sentencepiece_model_lacks_image(tokenizer_folder: Path, tmp_path: Path) -> None:
    shutil.copy(tokenizer_folder / "tokenizer.model", tmp_path / "spiece.model")
    for path in (tmp_path, tmp_path / "spiece.model"):
        with pytest.raises(DataError, match="without <image>; run `kosmos tokenizer import"):
            KosmosTokenizer.load(path)


@pytest.mark.parametrize("token", ["<image>", "</image>", "</line>"])
def test_settings_without_a_needed_token(tokenizer_folder: Path, tmp_path: Path, token: str) -> None:
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "copy"))
    settings = json.loads((folder / "kosmos_tokenizer.json").read_text())
    del settings["special_tokens"][token]
    (folder / "kosmos_tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match=f"lacks {token}; .*kosmos tokenizer import"):
        KosmosTokenizer.load(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda text: text.replace('"vocab_size": 400', '"vocab_size": 401'),
            "was changed after the tokenizer was made",
        ),
        (lambda text: text[:50], "is damaged"),
        (lambda text: "[]", "is damaged"),
        (lambda text: text.replace('"format"', '"unknown_key"'), "is damaged"),
    ],
)
def test_changed_settings_are_refused(tokenizer_folder: Path, tmp_path: Path, change: object, message: str) -> None:
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "copy"))
    path = folder / "kosmos_tokenizer.json"
    assert callable(change)
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=message):
        KosmosTokenizer.load(folder)


def test_a_changed_model_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "copy"))
    (folder / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(DataError, match=r"tokenizer\.model or .* was changed"):
        KosmosTokenizer.load(folder)


def test_special_tokens_outside_of_the_vocabulary(tokenizer: KosmosTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    path = tmp_path / "kosmos_tokenizer.json"
    path.write_text(path.read_text().replace('"<image>": 4', '"<image>": 400'))
    with pytest.raises(DataError, match=r"(?s)is damaged; .*the ids of <image> are not below vocab_size=400"):
        KosmosTokenizer.load(tmp_path)


def test_a_model_that_is_a_folder(tokenizer: KosmosTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer.model").mkdir()
    with pytest.raises(DataError, match=r"tokenizer\.model cannot be read: Is a directory"):
        KosmosTokenizer.load(tmp_path)


def test_reading_a_tokenizer_loads_no_torch(tokenizer_folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer;"
        f"print(KosmosTokenizer.load(Path({str(tokenizer_folder)!r})).vocab_size, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["400", "False"]


@given(st.lists(st.lists(st.integers(-(2**31), 2**31 - 1))))
def test_lists_become_one_array(lists: list[list[int]]) -> None:
    items, starts = flattened(lists)
    assert items.tolist() == [item for numbers in lists for item in (len(numbers), *numbers)]
    assert starts.tolist() == [sum(1 + len(numbers) for numbers in lists[:n]) for n in range(len(lists))]


@pytest.mark.parametrize("item", [2**31, -(2**31) - 1, 1.0, None, [1], "a", True])
def test_other_items_are_refused(item: Any) -> None:
    with pytest.raises(ValueError):
        flattened([[1], [2, item]])
