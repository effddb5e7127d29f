"""Real text in a hundred languages comes back from trained tokenizers as it was, and from imported ones as documented.

The text is that of the translations in the Django package: sentences, placeholders and line breaks.
"""

import io
import unicodedata
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import sentencepiece

from megatron_kosmos.data.tokenization.making import TrainingSettings, import_tokenizer, train_tokenizer
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer

Kind = Literal["unigram", "bpe", "byte-bpe"]
KINDS: tuple[Kind, ...] = get_args(Kind)
CHARACTERS_OF_A_LANGUAGE = 2000
TRAINED_ON = ("ar", "cs", "de", "el", "fr", "he", "hi", "ru")
"""The others are news to the tokenizers: they write many of their characters in bytes."""
SCRIPTS = {
    *("LATIN", "CYRILLIC", "GREEK", "ARMENIAN", "GEORGIAN", "ARABIC", "HEBREW", "DEVANAGARI", "BENGALI", "GURMUKHI"),
    *("TAMIL", "TELUGU", "KANNADA", "MALAYALAM", "THAI", "MYANMAR", "KHMER", "HANGUL", "HIRAGANA", "KATAKANA", "CJK"),
}
AWKWARD = {
    "emoji joined by U+200D": "👩\u200d👩\u200d👧\u200d👦 🏳\ufe0f\u200d🌈 🇮🇳 👍🏽 1\ufe0f\u20e3",
    "right to left with marks": "\u202bשָׁלוֹם 123\u202c \u200fمرحبا\u200e (a) می\u200cخواهم",
    "tabs and double spaces": "\ta\t\tb  c   d \t e ",
    "CRLF": "one\r\ntwo\r\n\r\nthree\r",
    "other ends of lines": "a\u0085b\u2028c\u2029d\x0be\x0cf",
    "spaces of all widths": "a\u00a0b\u2003c\u3000d\u200be\ufeff",
    "marks upon marks": "Z\u0351\u036b\u0343\u036a\u0302A\u0334\u0335 q\u0307\u0323 \u1e69",
    "compatibility forms": "ﬁ ① ½ ㎏ Å Ω ＡＢＣ ｶﾞ 한",
    "beyond the first plane": "𐍈 𓀀 𝕋 𠜎 \U000e0001 \U0010fffd",
    "the sign for a space": "\u2582\u2580",
    "nothing but newlines": "\n\n\n",
}


@cache
def languages() -> dict[str, str]:
    """Return the beginning of what is translated, by language."""
    package = find_spec("django")
    assert package is not None
    assert package.origin is not None
    texts = {}
    for file in sorted(Path(package.origin).parent.glob("conf/locale/*/LC_MESSAGES/django.po")):
        catalogue = file.read_text(encoding="utf-8")
        translated = [entry.partition('\nmsgstr "')[2] for entry in catalogue.split("\n\n")[1:]]
        texts[file.parts[-3]] = "\n".join(filter(None, translated))[:CHARACTERS_OF_A_LANGUAGE]
    return texts


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest) -> KosmosTokenizer:
    """A tokenizer trained on a few of the languages."""
    settings = TrainingSettings(900, model_type=request.param, num_threads=2)
    return train_tokenizer([languages()[name] for name in TRAINED_ON], settings)


def test_the_languages_are_many() -> None:
    text = "".join(languages().values())
    found = {unicodedata.name(character, "").split(" ")[0].split("-")[0] for character in set(text)}
    assert len(languages()) > 90
    assert found >= SCRIPTS
    assert unicodedata.normalize("NFC", text) != unicodedata.normalize("NFD", text)


def test_every_language_comes_back(trained: KosmosTokenizer) -> None:
    special = set(trained.settings.special_tokens.values()) - {trained.line_id}
    for language, text in languages().items():
        for form in (text, unicodedata.normalize("NFD", text)):
            ids = trained.encode(form)
            assert trained.decode(ids) == form, language
            assert special.isdisjoint(ids)


@pytest.mark.parametrize("name", AWKWARD)
def test_what_is_awkward_comes_back(trained: KosmosTokenizer, name: str) -> None:
    for text in (AWKWARD[name], f"a{AWKWARD[name]}\nb {AWKWARD[name]}"):
        assert trained.decode(trained.encode(text)) == text


def test_sentencepiece_takes_its_sign_for_a_space(trained: KosmosTokenizer) -> None:
    expected = "a\u2581b" if trained.settings.backend == "tokenizers" else "a b"
    assert trained.decode(trained.encode("a\u2581b")) == expected


@pytest.mark.parametrize("newlines", ["line", "collapse"])
def test_nothing_but_newlines_goes_by_the_choice(newlines: Literal["line", "collapse"]) -> None:
    """Also where lines end with CRLF: its first half is a character as any other."""
    settings = TrainingSettings(600, newlines=newlines, num_threads=2)
    tokenizer = train_tokenizer([languages()["cs"], languages()["de"]], settings)
    assert tokenizer.settings.newlines == newlines
    for text in (*AWKWARD.values(), languages()["th"], languages()["ar"]):
        assert tokenizer.decode(tokenizer.encode(text)) == (text.replace("\n", " ") if newlines == "collapse" else text)


@pytest.fixture(scope="module", params=["spiece.model", "sentencepiece.bpe.model"])
def foreign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the normalization and the special pieces of T5 or XLM-R, and without bytes."""
    pieces: dict[str, dict[str, Any]] = {
        "spiece.model": {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
        "sentencepiece.bpe.model": {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1},
    }
    lines = [line for name in ("cs", "de", "fr") for line in languages()[name].split("\n")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=300, minloglevel=2, num_threads=2,
        normalization_rule_name="nmt_nfkc", character_coverage=0.999, **pieces[request.param],
    )  # fmt: skip
    file = tmp_path_factory.mktemp("foreign") / request.param
    file.write_bytes(model.getvalue())
    return file


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a  b\tc ", "a b c"),  # white space runs together
        ("one\r\ntwo", "one two"),
        ("cafe\u0301", "café"),  # composed
        ("ﬁ ㎏ Ｐｄ", "fi kg Pd"),  # compatibility forms
        ("a 𓀀", "a  ⁇ "),  # no piece, and no bytes to write it in
    ],
)
def test_imported_models_normalize_as_they_were_made_to(foreign: Path, text: str, expected: str) -> None:
    tokenizer = import_tokenizer(foreign)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == expected.removesuffix(" ⁇ ")  # <unk> is a special token, and left out
    assert (tokenizer.unk_id in ids) == ("⁇" in expected)


def test_newlines_survive_an_import_when_asked_for(foreign: Path) -> None:
    """CRLF does not: the model takes its first half for white space."""
    assert import_tokenizer(foreign).settings.newlines == "collapse"
    tokenizer = import_tokenizer(foreign, newlines="line")
    assert tokenizer.settings.newlines == "line"
    assert tokenizer.decode(tokenizer.encode("one\r\ntwo\n\nthree")) == "one\ntwo\n\nthree"
    for language in ("de", "ru", "ja", "ar"):
        text = languages()[language]
        read = tokenizer.decode(tokenizer.encode(text))
        assert read.count("\n") == text.count("\n")
