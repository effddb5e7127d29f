"""The training tokenizer as transformers has it: a stock fast tokenizer, or the class that travels with the folder."""

import json
import shutil
import tempfile
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast, XLMRobertaTokenizer

from megatron_kosmos.hf.kosmos2 import FormatError
from megatron_kosmos.hf.tokenization_kosmos import SPECIAL_TOKENS, KosmosHFTokenizer

SENTENCEPIECE_FILE, FAST_FILE = KosmosHFTokenizer.vocab_files_names["vocab_file"], "tokenizer.json"
SETTINGS_FILE = KosmosHFTokenizer.vocab_files_names["settings_file"]
XLM_ROBERTA_FILE = "sentencepiece.bpe.model"


def training_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of `folder`, which `kosmos tokenizer` wrote; its ids are those of training.

    A tokenizer.json goes as it is into transformers' own class, told that special tokens in a text are text.
    """
    settings = json.loads((folder / SETTINGS_FILE).read_bytes())
    if settings.get("backend", "sentencepiece") == "sentencepiece":
        return KosmosHFTokenizer.from_pretrained(folder)
    tokenizer = Tokenizer.from_file(str(folder / FAST_FILE))
    names = {role: tokenizer.id_to_token(settings["special_tokens"][name]) for role, name in SPECIAL_TOKENS.items()}
    images = {role: names.pop(role) for role in ("image_token", "end_of_image_token")}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        extra_special_tokens=images,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        padding_side=KosmosHFTokenizer.padding_side,
        model_input_names=KosmosHFTokenizer.model_input_names,
        **names,
    )


def stock_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of `folder` as transformers' own class, for `Kosmos2Processor`.

    A sentencepiece model becomes XLM-R's class, as Kosmos-2 has it, with the special tokens that it lacks added at
    their ids. Raises FormatError where that class would give other ids.
    """
    settings = json.loads((folder / SETTINGS_FILE).read_bytes())
    if settings.get("backend", "sentencepiece") != "sentencepiece":
        return training_tokenizer(folder)
    with tempfile.TemporaryDirectory() as made:
        shutil.copyfile(folder / SENTENCEPIECE_FILE, Path(made) / XLM_ROBERTA_FILE)
        tokenizer: PreTrainedTokenizerBase = XLMRobertaTokenizer.from_pretrained(made)
    special: dict[str, int] = settings["special_tokens"]
    for name, number in sorted(special.items(), key=lambda item: item[1]):
        if number >= len(tokenizer):
            # Kosmos2Processor adds its own in the same manner.
            tokenizer.add_tokens([AddedToken(name, lstrip=True, rstrip=False, normalized=False)])
    moved = [f"{name} {number}" for name, number in special.items() if tokenizer.convert_tokens_to_ids(name) != number]
    if moved or settings["piece_offset"] != 1:
        raise FormatError(
            f"the tokenizer {folder} is not numbered as XLM-R's, which Kosmos-2's is: "
            f"{', '.join(moved[:4]) or 'its pieces'} would get other ids. Export without --format kosmos2"
        )
    return tokenizer


def exported_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of an exported folder, without running code of the folder."""
    is_sentencepiece = (folder / SENTENCEPIECE_FILE).is_file()
    return (KosmosHFTokenizer if is_sentencepiece else PreTrainedTokenizerFast).from_pretrained(folder)


__all__ = ["exported_tokenizer", "stock_tokenizer", "training_tokenizer"]
