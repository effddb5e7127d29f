"""The training tokenizer as transformers has it: a stock fast tokenizer, or the class that travels with the folder."""

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_kosmos.hf.tokenization_kosmos import SPECIAL_TOKENS, KosmosHFTokenizer

SENTENCEPIECE_FILE, FAST_FILE = KosmosHFTokenizer.vocab_files_names["vocab_file"], "tokenizer.json"
SETTINGS_FILE = KosmosHFTokenizer.vocab_files_names["settings_file"]


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


def exported_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of an exported folder, without running code of the folder."""
    is_sentencepiece = (folder / SENTENCEPIECE_FILE).is_file()
    return (KosmosHFTokenizer if is_sentencepiece else PreTrainedTokenizerFast).from_pretrained(folder)


__all__ = ["exported_tokenizer", "training_tokenizer"]
