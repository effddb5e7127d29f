"""Tokenizers of Hugging Face's library: ids are kept, no text becomes a special token, and all of it comes back."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from megatron_kosmos.cli import tokenizer as tokenizer_command
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.tokenization.making import TrainingSettings, find_model, import_tokenizer, train_tokenizer
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from megatron_kosmos.prompt import SPECIAL_TOKENS
from tests.unit.data.tokenization.foreign_tokenizers import END, FALCON_SPECIALS, falcon_like, gpt2_like

TEXTS = list(topics.values())[:20]
KINDS = ("falcon", "gpt2", "trained")
AWKWARD = [
    "",
    " ",
    "\n",
    "Zażółć  gęślą jaźń\n\tこんにちは世界 — שלום 🎉\r\n  indented\n\n\x00end ",
    f"a{END}b <image></image> {' '.join(SPECIAL_TOKENS)}{''.join(FALCON_SPECIALS)}",
    "1234567 ½ ﬁ \u2581 \ufffd",
]


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {"falcon": falcon_like(root / "falcon", TEXTS), "gpt2": gpt2_like(root / "gpt2", TEXTS)}


@pytest.fixture(scope="session")
def made(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, KosmosTokenizer]:
    root = tmp_path_factory.mktemp("made")
    for name, file in sources.items():
        import_tokenizer(file, bos_is_eos=name == "gpt2").save(root / name)
    train_tokenizer(TEXTS, TrainingSettings(400, model_type="byte-bpe")).save(root / "trained")
    return {name: KosmosTokenizer.load(root / name) for name in KINDS}


def specials_of(tokenizer: KosmosTokenizer) -> set[int]:
    return set(tokenizer.settings.special_tokens.values())


def test_falcons_kind_keeps_its_ids_and_gets_ours_after_them(made: dict[str, KosmosTokenizer]) -> None:
    ours = made["falcon"]
    assert [ours.settings.special_tokens[name] for name in FALCON_SPECIALS] == list(range(12))
    assert (ours.eos_id, ours.pad_id, ours.bos_id, ours.unk_id, ours.image_id, ours.end_of_image_id) == (
        *(11, 400, 401, 402, 403, 404),
    )
    assert (ours.vocab_size, ours.line_id) == (405, None)
    assert ours.decode([401, *ours.encode("two words"), 403, 404, 11], skip_special=False) == (
        f"<s>two words<image></image>{END}"
    )


def test_gpt2s_kind_begins_with_its_end_and_pads_with_an_id_of_its_own(made: dict[str, KosmosTokenizer]) -> None:
    ours = made["gpt2"]
    assert ours.bos_id == ours.eos_id == 399
    assert (ours.pad_id, ours.unk_id, ours.image_id, ours.end_of_image_id, ours.vocab_size) == (400, 401, 402, 403, 404)


def test_a_trained_one_has_the_special_tokens_of_every_trained_one(made: dict[str, KosmosTokenizer]) -> None:
    ours = made["trained"]
    assert [ours.settings.special_tokens[name] for name in SPECIAL_TOKENS] == list(range(7))
    assert (ours.vocab_size, ours.settings.newlines) == (400, "keep")
    again = train_tokenizer(TEXTS, TrainingSettings(400, model_type="byte-bpe"))
    assert again.fingerprint == ours.fingerprint


@pytest.mark.parametrize("kind", ["falcon", "gpt2"])
def test_ids_are_those_of_the_file(
    kind: str, sources: dict[str, Path], made: dict[str, KosmosTokenizer], tmp_path: Path
) -> None:
    theirs = Tokenizer.from_file(str(sources[kind]))
    theirs.no_truncation()
    theirs.no_padding()
    for text in (*TEXTS[:5], *AWKWARD[:4]):
        assert made[kind].encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert find_model(sources[kind].parent) == sources[kind]
    import_tokenizer(sources[kind].parent, bos_is_eos=kind == "gpt2").save(tmp_path)
    assert KosmosTokenizer.load(tmp_path).fingerprint == made[kind].fingerprint


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_texts_come_back(kind: str, text: str, made: dict[str, KosmosTokenizer]) -> None:
    ids = made[kind].encode(text)
    assert made[kind].decode(ids) == text
    assert specials_of(made[kind]).isdisjoint(ids)


words = st.sampled_from([*SPECIAL_TOKENS, *FALCON_SPECIALS, " ", "\n", "\n\n", "a"])
texts = (
    st.text(st.characters(exclude_categories=["Cs"])) | st.text("<>|/simageldofxt \n") | st.lists(words).map("".join)
)


@given(text=texts)
def test_every_text_comes_back_and_no_text_is_a_special_token(made: dict[str, KosmosTokenizer], text: str) -> None:
    for ours in made.values():
        ids = ours.encode(text)
        assert ours.decode(ids) == text
        assert specials_of(ours).isdisjoint(ids)


def test_a_lone_surrogate_is_named(made: dict[str, KosmosTokenizer]) -> None:
    with pytest.raises(UnicodeEncodeError, match="position 1"):
        made["falcon"].encode("a\ud800b")


def test_ids_outside_and_other_files_are_refused(made: dict[str, KosmosTokenizer], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="id 405 is outside the vocabulary of 405"):
        made["falcon"].decode([405])
    made["falcon"].save(tmp_path)
    settings = tmp_path / "kosmos_tokenizer.json"
    changed = settings.read_text().replace('"backend": "tokenizers"', '"backend": "sentencepiece"')
    model = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(model.replace('"dropout": null', '"dropout": 0.5'))
    with pytest.raises(DataError, match=r"tokenizer\.json or .* was changed"):
        KosmosTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json or .* was changed"):
        KosmosTokenizer.load(tmp_path)
    settings.write_text(changed)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(DataError, match=r"newlines='keep' does not go with backend='sentencepiece'"):
        KosmosTokenizer.load(tmp_path)


def test_a_file_that_was_not_imported_says_how(sources: dict[str, Path]) -> None:
    for path in (sources["falcon"], sources["falcon"].parent):
        with pytest.raises(DataError, match=r"Hugging Face tokenizer without .*kosmos tokenizer import"):
            KosmosTokenizer.load(path)


def test_newlines_have_no_other_policy(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"newlines=line is not to be had with a tokenizer\.json, only keep"):
        import_tokenizer(sources["falcon"], newlines="line")
    with pytest.raises(DataError, match="newlines=collapse is not to be had with byte-bpe, only keep"):
        train_tokenizer(TEXTS, TrainingSettings(400, model_type="byte-bpe", newlines="collapse"))
    with pytest.raises(DataError, match="newlines=keep is not to be had with unigram, only line or collapse"):
        train_tokenizer(TEXTS, TrainingSettings(400, newlines="keep"))
    with pytest.raises(DataError, match="Give more text or another vocabulary size"):
        train_tokenizer(["too little"], TrainingSettings(400, model_type="byte-bpe"))


def changed(file: Path, folder: Path, change: Any, config: dict[str, Any] | None = None) -> Path:
    """Write a copy of a tokenizer.json whose content `change` has edited, with or without a configuration beside it."""
    content = json.loads(file.read_bytes())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


def test_roles_are_told_or_known_by_name(sources: dict[str, Path], tmp_path: Path) -> None:
    told = {"eos_token": {"content": ">>SUFFIX<<"}, "bos_token": ">>PREFIX<<", "pad_token": ">>SUFFIX<<"}
    ours = import_tokenizer(changed(sources["falcon"], tmp_path, lambda _: None, told))
    assert (ours.eos_id, ours.bos_id, ours.pad_id) == (9, 8, 400)
    (tmp_path / "tokenizer_config.json").unlink()
    assert import_tokenizer(tmp_path).eos_id == 11

    def rename(content: dict[str, Any]) -> None:
        content["added_tokens"][11]["content"] = "<|stop|>"
        content["model"]["vocab"]["<|stop|>"] = content["model"]["vocab"].pop(END)

    with pytest.raises(DataError, match=r"has no end-of-text token of a known name .*tokenizer_config\.json"):
        import_tokenizer(changed(sources["falcon"], tmp_path, rename))


@pytest.mark.parametrize("beside, message", [("{", "is not JSON"), ("[]", "holds no JSON object")])
def test_a_damaged_file_beside_it_is_named(sources: dict[str, Path], tmp_path: Path, beside: str, message: str) -> None:
    file = changed(sources["falcon"], tmp_path, lambda _: None)
    (tmp_path / "tokenizer_config.json").write_text(beside)
    with pytest.raises(DataError, match=rf"tokenizer_config\.json {message}"):
        import_tokenizer(file)


def test_what_the_library_can_do_without_may_be_missing(sources: dict[str, Path], tmp_path: Path) -> None:
    def leave_out(content: dict[str, Any]) -> None:
        del content["added_tokens"]

    ours = import_tokenizer(changed(sources["falcon"], tmp_path, leave_out, {"eos_token": {"lstrip": False}}))
    assert ours.encode("abc") == import_tokenizer(sources["falcon"]).encode("abc")

    words = Tokenizer(models.WordLevel({"two": 0, "words": 1, "<unk>": 2}, unk_token="<unk>"))
    words.add_special_tokens(["</s>"])
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "tokenizer.json"))
    ours = import_tokenizer(changed(tmp_path / "tokenizer.json", tmp_path, lambda content: content.pop("decoder")))
    assert ours.decode(ours.encode("two words")) == "two words"


@pytest.mark.parametrize("decoder", [None, {"type": "Fuse"}])
def test_bytes_without_what_reads_them_back_are_refused(
    sources: dict[str, Path], tmp_path: Path, decoder: dict[str, str] | None
) -> None:
    for kind in ("falcon", "gpt2"):
        with pytest.raises(
            DataError, match=r"its pre_tokenizer is ByteLevel\), but its decoder is .* cannot read them"
        ):
            import_tokenizer(changed(sources[kind], tmp_path, lambda content: content.update(decoder=decoder)))


def test_added_tokens_that_are_text_stay_text(sources: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(sources["gpt2"]))
    tokenizer.add_tokens([AddedToken("    ", normalized=False), AddedToken("<image>")])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = import_tokenizer(tmp_path / "tokenizer.json")
    assert ours.encode("a    b").count(400) == 1
    assert ours.decode(ours.encode("a    b")) == "a    b"
    assert ours.image_id == 401
    assert 401 not in ours.encode("<image>")


def test_a_model_that_writes_special_tokens_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    def merge(content: dict[str, Any]) -> None:
        vocab = content["model"]["vocab"]
        vocab |= {"<s": 400, "<s>": 401}
        content["model"]["merges"] += [["<", "s"], ["<s", ">"]]

    with pytest.raises(DataError, match="a text that reads <s> becomes that special token"):
        import_tokenizer(changed(sources["falcon"], tmp_path, merge))

    unigram = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("a", -1.0)], unk_id=2))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.add_special_tokens(["<pad>", "</s>", "<unk>"])
    unigram.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="import the sentencepiece model"):
        import_tokenizer(tmp_path / "tokenizer.json")


def test_missing_bytes_are_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    def forget(content: dict[str, Any]) -> None:
        number = content["model"]["vocab"].pop("Ā")
        content["model"]["vocab"]["unused"] = number

    with pytest.raises(DataError, match="lacks 1 of the 256 bytes"):
        import_tokenizer(changed(sources["gpt2"], tmp_path, forget))


def test_the_commands_import_train_and_inspect(sources: dict[str, Path], tmp_path: Path) -> None:
    app = typer.Typer()
    tokenizer_command.register(app)
    runner = CliRunner()

    def run(*arguments: object) -> str:
        result = runner.invoke(app, ["tokenizer", *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return result.output

    said = run("import", sources["falcon"].parent, "--output", tmp_path / "falcon", "--bos-is-eos")
    assert "404 ids, newlines: keep" in said  # the 400 of the file, <pad>, <unk>, <image>, </image>
    assert f"{END} 11  </s> 11  <s> 11" in said
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXTS))
    said = run("train", "--input", text, "--output", tmp_path / "own", "--vocab-size", 300, "--model-type", "byte-bpe")
    assert "300 ids, newlines: keep" in said
    said = run("inspect", tmp_path / "own", "--text", "a\n<s>")
    assert "5 tokens" in said
    result = runner.invoke(
        app, ["tokenizer", "import", str(sources["gpt2"]), "--output", str(tmp_path / "no"), "--newlines", "line"]
    )
    assert isinstance(result.exception, SystemExit)
    assert "newlines=line" in str(result.exception.code) + result.output
    assert not (tmp_path / "no").exists()


def test_sentencepiece_folders_keep_their_fingerprint(tokenizer: KosmosTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "new")
    old = Path(shutil.copytree(tmp_path / "new", tmp_path / "old"))
    settings = json.loads((old / "kosmos_tokenizer.json").read_text())
    assert settings.pop("backend") == "sentencepiece"
    (old / "kosmos_tokenizer.json").write_text(json.dumps(settings))
    assert KosmosTokenizer.load(old).fingerprint == tokenizer.fingerprint == settings["fingerprint"]


def test_reading_one_loads_no_torch(made: dict[str, KosmosTokenizer], tmp_path: Path) -> None:
    made["falcon"].save(tmp_path)
    code = (
        "import sys; from pathlib import Path; from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer;"
        f"print(KosmosTokenizer.load(Path({str(tmp_path)!r})).encode('a'), 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("False")
