"""A small trained tokenizer, pictures, and corpora in the real file formats."""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pyarrow
import pytest
from PIL import Image

from megatron_kosmos.config import CorpusConfig
from megatron_kosmos.data.packing.row_format import RowFormat
from megatron_kosmos.data.preparation.preprocess import Preparation, prepare
from megatron_kosmos.data.tokenization.making import TrainingSettings, train_tokenizer
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from megatron_kosmos.prompt import SourceKind
from tests.unit.data.packing.made_corpora import folder_in_memory


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 400 ids."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(list(topics.values())[:20], TrainingSettings(400)).save(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> KosmosTokenizer:
    return KosmosTokenizer.load(tokenizer_folder)


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """Returns an encoded picture of noise; the seed makes it recognizable."""

    def make(seed: int = 0, width: int = 12, height: int = 10, file_format: str = "PNG") -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, file_format)
        return buffer.getvalue()

    return make


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """A `tmp_path` in memory, for small corpora: preparing one is mostly waiting until the disk has it."""
    with folder_in_memory() as folder:
        yield Path(folder)


PrepareCorpus = Callable[[SourceKind, Path], CorpusConfig]


@pytest.fixture
def prepare_corpus(memory_path: Path, tokenizer_folder: Path) -> PrepareCorpus:
    """Prepares an input file for rows of 64 tokens and 4 latents and returns the corpus."""

    def make(kind: SourceKind, source: Path) -> CorpusConfig:
        prefix = memory_path / source.stem
        row_format = RowFormat(sequence_length=64, num_latents=4)
        prepare(Preparation(kind, (source,), prefix, tokenizer_folder, row_format=row_format))
        return CorpusConfig(kind=kind, prefix=prefix)

    return make


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[[str, Sequence[str]], Path]:
    """Writes a file of lines."""

    def write(name: str, lines: Sequence[str]) -> Path:
        path = tmp_path / name
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def prepare_blend(
    prepare_corpus: PrepareCorpus,
    write_lines: Callable[[str, Sequence[str]], Path],
    picture: Callable[..., bytes],
    tmp_path: Path,
) -> Callable[..., tuple[CorpusConfig, ...]]:
    """Prepares a corpus of each kind from its lines, which may name the pictures `0.png`, `1.png`, …"""

    def make(lines: dict[SourceKind, list[dict[str, object]]], num_pictures: int) -> tuple[CorpusConfig, ...]:
        for seed in range(num_pictures):
            (tmp_path / f"{seed}.png").write_bytes(picture(seed))
        return tuple(
            prepare_corpus(kind, write_lines(f"{kind}.jsonl", [json.dumps(line) for line in of]))
            for kind, of in lines.items()
        )

    return make


@pytest.fixture
def compress() -> Callable[[bytes, str], bytes]:
    """Returns data as a .gz or .zst file has it, in two pieces as parallel compressors write; "" leaves it plain."""

    def make(data: bytes, suffix: str) -> bytes:
        if not suffix:
            return data
        pieces = data[: len(data) // 2], data[len(data) // 2 :]
        codec = pyarrow.Codec({".gz": "gzip", ".zst": "zstd"}[suffix])
        return b"".join(codec.compress(piece, asbytes=True) for piece in pieces)

    return make
