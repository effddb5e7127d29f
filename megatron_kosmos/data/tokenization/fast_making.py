"""Making tokenizers of the `tokenizers` library: importing a tokenizer.json, or training byte-level BPE.

The file that comes out holds every special token, marked as special, and no other rule that adds ids than the `<s>` of
documents, which encoding leaves away: transformers reads it as it is and gives the same ids.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.tokenization.fast_backend import load_fast
from megatron_kosmos.data.tokenization.settings import TokenizerSettings
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from megatron_kosmos.prompt import BOS, END_OF_IMAGE, EOS, IMAGE, PAD, SPECIAL_TOKENS, UNK

NAMES_OF_ROLES = {
    EOS: ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>"),
    BOS: ("<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>"),
    PAD: ("<pad>", "<|padding|>", "<|pad|>", "[PAD]"),
    UNK: ("<unk>", "[UNK]"),
}
"""What files call our special tokens, where the `tokenizer_config.json` beside them does not say."""
KEYS_OF_ROLES = {EOS: "eos_token", BOS: "bos_token", PAD: "pad_token", UNK: "unk_token"}
BYTES = pre_tokenizers.ByteLevel.alphabet()
"""The characters that stand for the 256 bytes in byte-level vocabularies."""


def train_byte_bpe(texts: Iterable[str], vocab_size: int) -> KosmosTokenizer:
    """Train byte-level BPE as GPT-2 has it on `texts`, with the special tokens of `prompt` at ids 0 … 6.

    Raises DataError when the text is too small for the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(BYTES),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise DataError(
            f"byte-level BPE found {tokenizer.get_vocab_size()} pieces in the text, not {vocab_size}. "
            f"Give more text or another vocabulary size"
        )
    return _complete(json.loads(tokenizer.to_str()), {}, bos_is_eos=False, origin="trained")


def import_fast(file: Path, bos_is_eos: bool) -> KosmosTokenizer:
    """Take over a tokenizer.json, whose ids it keeps, and add the special tokens that it lacks after its vocabulary.

    Which tokens are `</s>`, `<s>`, `<pad>` and `<unk>` says the `tokenizer_config.json` beside it, or their names;
    `<pad>` and `<unk>` get ids of their own where they would share that of `</s>`. Raises DataError when there is no
    `</s>`, when a file is damaged, when ids cannot be decoded, or when a text can be encoded as a special token.
    """
    load_fast(file.read_bytes(), str(file))
    content = {"added_tokens": [], "decoder": None} | json.loads(file.read_bytes())  # what the library can do without
    config = file.with_name("tokenizer_config.json")
    return _complete(content, _read_object(config) if config.is_file() else {}, bos_is_eos, str(file))


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{file} is not JSON: {error}; get it again, or remove it") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} holds no JSON object; get it again, or remove it")
    return content


def _complete(content: dict[str, Any], roles: dict[str, Any], bos_is_eos: bool, origin: str) -> KosmosTokenizer:
    """Return the tokenizer of the parsed tokenizer.json `content`, which is changed; `roles` is a tokenizer_config."""
    added = content["added_tokens"]
    ids = content["model"]["vocab"] if isinstance(content["model"]["vocab"], dict) else {}
    ids = ids | {token["content"]: token["id"] for token in added}
    names = _names_of_roles(ids, roles)
    if EOS not in names:
        raise DataError(
            f"{origin} has no end-of-text token of a known name ({', '.join(NAMES_OF_ROLES[EOS])}); "
            f'name it in a tokenizer_config.json beside it: {{"eos_token": …}}'
        )
    if bos_is_eos:
        names.setdefault(BOS, names[EOS])
    vocab_size = load_fast(json.dumps(content).encode(), origin).get_vocab_size(with_added_tokens=True)
    vocab_size = max(vocab_size, max(ids.values(), default=0) + 1)
    for role in (PAD, BOS, UNK, IMAGE, END_OF_IMAGE):
        name = names.setdefault(role, role)
        if name not in ids:
            ids[name] = vocab_size
            vocab_size += 1
    own = {token["content"]: token for token in added}
    for name in dict.fromkeys(names.values()):
        plain = {"content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        own[name] = own.get(name, {"id": ids[name], **plain}) | {"special": True}
    content["added_tokens"] = sorted(own.values(), key=lambda token: token["id"])
    content |= {"truncation": None, "padding": None, "post_processor": _begin_with(names[BOS], ids[names[BOS]])}
    if "dropout" in content["model"]:
        content["model"]["dropout"] = None  # BPE's, of training: ids must not be drawn
    special = {token["content"]: token["id"] for token in content["added_tokens"] if token["special"]}
    _check(content, special, names[UNK], origin)
    settings = TokenizerSettings(
        backend="tokenizers",
        vocab_size=vocab_size,
        special_tokens=special | {role: ids[name] for role, name in names.items()},
        newlines="keep",
    )
    return KosmosTokenizer(json.dumps(content, ensure_ascii=False).encode(), settings, origin)


def _names_of_roles(ids: dict[str, int], roles: dict[str, Any]) -> dict[str, str]:
    """Return what the file calls each special token that it has, `</s>` first."""
    names: dict[str, str] = {}
    for role, key in KEYS_OF_ROLES.items():
        told = roles.get(key)
        told = told.get("content") if isinstance(told, dict) else told
        for name in (told, *NAMES_OF_ROLES[role]):
            is_taken = role in {PAD, UNK} and name == names.get(EOS)
            if name in ids and not is_taken:
                names[role] = name
                break
    return names


def _begin_with(name: str, number: int) -> dict[str, Any]:
    """Return the post-processor that puts `<s>`, here called `name`, before a text, and before each of a pair."""
    begin = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": part, "type_id": 0}} for part in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, begin, second],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]}},
    }


def _check(content: dict[str, Any], special: dict[str, int], unk: str, origin: str) -> None:
    """Raise DataError when ids move, when bytes are missing, or when text can become a special token but `unk`."""
    tokenizer = load_fast(json.dumps(content).encode(), origin)
    moved = [name for name, number in special.items() if tokenizer.token_to_id(name) != number]
    if moved:
        raise DataError(f"{origin}: the tokenizers library gives {', '.join(moved)} other ids than the file says")
    model = content["model"]
    writes_bytes, reads_bytes = (
        '"ByteLevel"' in json.dumps(content.get(part)) for part in ("pre_tokenizer", "decoder")
    )
    if writes_bytes and not reads_bytes:
        raise DataError(
            f"{origin} writes text as bytes (its pre_tokenizer is ByteLevel), but its decoder is "
            f"{json.dumps(content['decoder'])}, which cannot read them back; if that is an oversight, let it be "
            f'"decoder": {{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false}}'
        )
    if reads_bytes and (missing := set(BYTES) - set(model["vocab"])):
        raise DataError(f"{origin} lacks {len(missing)} of the 256 bytes: text with them would vanish")
    written = set(_written_by(tokenizer, model, special)) - {unk}
    if written:
        raise DataError(
            f"{origin}: a text that reads {', '.join(sorted(written))} becomes that special token, not text; "
            f"import the sentencepiece model that it was made from, if there is one, or train a tokenizer"
        )


def _written_by(tokenizer: Tokenizer, model: dict[str, Any], special: dict[str, int]) -> Iterator[str]:
    """Yield the special tokens that the model can give for text: as a piece of its own, a merge or an unknown."""
    names = {number: name for name, number in special.items()}
    merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", ()))
    products = {left + right for left, right in merges}
    for name in special:
        if name in products or name == model.get("unk_token"):
            yield name
        for text in (name, f" {name}", f"a {name} a", f"a{name}a"):
            yield from (
                names[number] for number in tokenizer.encode(text, add_special_tokens=False).ids if number in names
            )
