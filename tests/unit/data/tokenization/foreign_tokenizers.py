"""Small tokenizer.json files in Falcon's and GPT-2's manner: their specials, pre-tokenizers and post-processors."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END = "<|endoftext|>"
_TOPICS = ("TITLE", "ABSTRACT", "INTRODUCTION", "SUMMARY", "COMMENT", "ANSWER", "QUESTION", "DOMAIN")
FALCON_SPECIALS = (*(f">>{name}<<" for name in (*_TOPICS, "PREFIX", "SUFFIX", "MIDDLE")), END)


def falcon_like(folder: Path, texts: Iterable[str], vocab_size: int = 400) -> Path:
    """Write Falcon's kind: twelve specials first, digits in threes. Returns the file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    _train(tokenizer, texts, vocab_size, list(FALCON_SPECIALS))
    return _write(tokenizer, folder, {"eos_token": END, "model_max_length": 2048})


def gpt2_like(folder: Path, texts: Iterable[str], vocab_size: int = 400) -> Path:
    """Write GPT-2's kind: one special for every role, last and normalized; a template adds it. Returns the file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, texts, vocab_size - 1, [])
    tokenizer.add_special_tokens([AddedToken(END, normalized=True)])
    end = tokenizer.token_to_id(END)
    tokenizer.post_processor = processors.TemplateProcessing(f"{END} $A {END}", None, [(END, end)])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=4, pad_id=end, pad_token=END)
    return _write(tokenizer, folder, dict.fromkeys(("bos_token", "eos_token", "unk_token"), END))


def _train(tokenizer: Tokenizer, texts: Iterable[str], vocab_size: int, specials: list[str | AddedToken]) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == vocab_size


def _write(tokenizer: Tokenizer, folder: Path, config: dict[str, object]) -> Path:
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"
