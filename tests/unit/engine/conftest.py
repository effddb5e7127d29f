"""A small trained tokenizer."""

from pathlib import Path

import pytest

from megatron_kosmos.data.tokenization.making import TrainingSettings, train_tokenizer
from tests.unit.engine.exported import TEXT


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder; 300 ids."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXT, TrainingSettings(vocab_size=300)).save(folder)
    return folder
