"""The prompt format of KOSMOS-1: special tokens, document layout and image preprocessing constants.

Everything that data preparation, generation and the Hugging Face export must agree on is stated here once
(arXiv 2302.14045, section 2.1 and table 1). No torch: `config` and `data` tools read it before torch is loaded.
"""

from typing import Final, Literal, get_args

SourceKind = Literal["text", "caption", "interleaved"]
SOURCE_KINDS: Final[tuple[SourceKind, ...]] = get_args(SourceKind)

PAD: Final = "<pad>"
BOS: Final = "<s>"
EOS: Final = "</s>"
UNK: Final = "<unk>"
IMAGE: Final = "<image>"
END_OF_IMAGE: Final = "</image>"
LINE: Final = "</line>"
"""Stands for a newline inside a text, as in the released KOSMOS tokenizer."""

SPECIAL_TOKENS: Final = (PAD, BOS, EOS, UNK, IMAGE, END_OF_IMAGE, LINE)
"""In the order of their ids in a tokenizer that `kosmos tokenizer train` makes."""

CAPTION_PROMPT: Final = "An image of"
"""The prompt of the paper's zero-shot captioning (section 4.2)."""

IMAGE_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD: Final = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's per-channel mean and standard deviation of pixels scaled to [0, 1]."""
