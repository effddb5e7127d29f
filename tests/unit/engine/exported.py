"""A small exported model of random weights, made by the real conversion, and pictures for it."""

from pathlib import Path

import numpy as np
from PIL import Image

from megatron_kosmos.data.tokenization.making import TrainingSettings, train_tokenizer
from megatron_kosmos.engine.convert import ExportOptions, to_hf
from tests.unit.hf.checkpoints import trained_run

TEXT = ["An image of a handwritten seven. Words and numbers, 0 1 2 3 4 5 6 7 8 9.\nAnother line."] * 5


def exported_folder(root: Path) -> Path:
    """Return the folder of an export: a vocabulary of 300, 3 slots a picture, 300 tokens at most."""
    train_tokenizer(TEXT, TrainingSettings(vocab_size=300)).save(root / "tokenizer")
    trained_run(root / "run", root / "tokenizer", model__decoder__vocab_size=300)
    to_hf(root / "run", root / "hf", ExportOptions(verify=False))
    return root / "hf"


def picture(seed: int) -> Image.Image:
    """Return a picture of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8))
