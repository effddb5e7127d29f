"""Corpora of all three kinds prepared with a byte-level tokenizer, and read back as training reads them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

from megatron_kosmos.config import CorpusConfig, DataConfig
from megatron_kosmos.data.corpora.indexed import IndexedReader
from megatron_kosmos.data.loading.loader import BatchGeometry, ImageFormat, StepLoader
from megatron_kosmos.data.packing.row_format import RowFormat
from megatron_kosmos.data.preparation.preprocess import Preparation, prepare
from megatron_kosmos.data.tokenization.making import import_tokenizer
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from megatron_kosmos.prompt import SOURCE_KINDS, SourceKind
from tests.unit.data.tokenization.foreign_tokenizers import falcon_like

WORDS = "two\n\n  lines, <image> and <|endoftext|> as text 🎉"
LINES: dict[SourceKind, list[dict[str, object]]] = {
    "text": [{"text": f"{number} {WORDS}"} for number in range(12)],
    "caption": [{"image": f"{number}.png", "caption": f"picture {number}\n"} for number in range(4)],
    "interleaved": [{"parts": [{"text": "see\n"}, {"image": "0.png"}, {"text": WORDS}, {"image": "1.png"}]}] * 3,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("falcon")
    import_tokenizer(falcon_like(root / "source", list(topics.values())[:20])).save(root / "tokenizer")
    return root / "tokenizer"


def test_what_was_written_is_what_training_reads(
    folder: Path,
    tmp_path: Path,
    write_lines: Callable[[str, Sequence[str]], Path],
    picture: Callable[..., bytes],
) -> None:
    tokenizer = KosmosTokenizer.load(folder)
    for seed in range(4):
        (tmp_path / f"{seed}.png").write_bytes(picture(seed))
    corpora = []
    for kind, lines in LINES.items():
        source = write_lines(f"{kind}.jsonl", [json.dumps(line) for line in lines])
        prefix = tmp_path / "prepared" / kind
        workers = 2 if kind == "text" else 1
        prepare(
            Preparation(
                kind,
                (source,),
                prefix,
                folder,
                row_format=RowFormat(sequence_length=96, num_latents=4),
                num_workers=workers,
            )
        )
        corpora.append(CorpusConfig(kind=kind, prefix=prefix))
    pair = [tokenizer.image_id, tokenizer.end_of_image_id]
    words = tokenizer.encode(WORDS)
    expected = {
        "text": [tokenizer.encode(f"{number} {WORDS}") for number in range(12)],
        "caption": [[*pair, *tokenizer.encode(f"picture {number}\n")] for number in range(4)],
        "interleaved": [[*tokenizer.encode("see\n"), *pair, *words, *pair]] * 3,
    }
    for kind in SOURCE_KINDS:
        written = IndexedReader(tmp_path / "prepared" / kind)
        assert written[0].dtype == np.uint16
        documents = [written[number].tolist() for number in range(len(written))]
        assert documents == [[tokenizer.bos_id, *ids, tokenizer.eos_id] for ids in expected[kind]]
    data = DataConfig(tokenizer=folder, sequence_length=96, train=tuple(corpora), num_workers=0)
    loader = StepLoader(data, ImageFormat(num_latents=4, size=8), BatchGeometry(3, 6), seed=5)
    batches = [batch for step in loader.steps(0, 2) for batch in step]
    assert {source for batch in batches for source in batch.sources.tolist()} == {0, 1, 2}
    read = "".join(tokenizer.decode(row) for batch in batches for row in batch.input_ids)
    assert WORDS in read
    assert "picture 2\n" in read
    for batch in batches:
        for row, column in batch.image_positions.tolist():
            assert batch.input_ids[row, column - 1] == tokenizer.image_id
            assert batch.input_ids[row, column + 4] == tokenizer.end_of_image_id
