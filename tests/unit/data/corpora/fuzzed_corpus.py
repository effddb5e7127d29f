"""Damages files of a prepared corpus in a process with bounded memory, and reads all of it each time.

`python -m tests.unit.data.corpora.fuzzed_corpus FOLDER FIRST LAST` prints how the cases of these
seeds ended, as JSON. FOLDER has `corpus/corpus.*`, `tokenizer/` and an empty `plans/`.
"""

import json
import random
import re
import struct
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kosmos.config import CorpusConfig
from megatron_kosmos.data.corpora.corpus import Corpus
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.loading.packed_rows import EpochPlan, Packer
from megatron_kosmos.data.packing.plan_store import PlanStore
from megatron_kosmos.data.packing.row_format import RowFormat
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from tests.unit.data.sources.limited_reading import limit_memory

MEGABYTES = 256
NUMBERS = [0, 1, -1, 2, 3, 255, 2**15, 2**31 - 1, -(2**31), 2**32, 2**61, 2**62, 2**63 - 1, -(2**63), 2**64 // 12 + 1]
"""Sizes and offsets that wrap around when they are added or multiplied."""
VALUES = [*map(str, NUMBERS), "1e999", "NaN", "null", '"x"', "[]", "{}", "true", "9" * 5000, "[" * 100_000]
JSON_VALUE = re.compile(rb'(?<=: )("[^"\n]*"|[^",\n\[{]+)')


def damage(draw: random.Random, data: bytearray) -> None:
    """Change a few bytes, numbers, or the length."""
    at = draw.randrange(min(len(data), 64) if draw.random() < 0.4 else len(data))
    match draw.randrange(6):
        case 0:
            data[at] ^= 1 << draw.randrange(8)
        case 1 | 2:
            width = draw.choice([4, 8])
            data[at : at + width] = struct.pack("<Q", draw.choice(NUMBERS) % 2**64)[:width][: len(data) - at]
        case 3:
            values = list(JSON_VALUE.finditer(data)) if data[:1] == b"{" else []
            if values:
                start, stop = draw.choice(values).span()
                data[start:stop] = draw.choice(VALUES).encode()
            else:  # an array of the same number
                stop = at + 4 * draw.randrange(1, 40)
                data[at:stop] = (struct.pack("<i", draw.choice([-1, 0, 2**30])) * 40)[: len(data[at:stop])]
        case 4:
            del data[at : at + draw.choice([1, 4, 8, len(data)])]
        case 5:
            data[at:at] = draw.randbytes(draw.choice([1, 4, 8, 24, 4096]))


class Fuzzer:
    """The files as they should be, and what is read of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = KosmosTokenizer.load(folder / "tokenizer")
        self.expected = self.read_corpus()
        self.plan = self.make_plan()
        self.read_plan()
        indexes = [folder / "corpus" / name for name in ("corpus.idx", "corpus.images.idx")]
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock"]
        self.files = [*files, *indexes * 6]
        self.contents = {path: path.read_bytes() for path in files}

    def open_corpus(self) -> tuple[Corpus, Packer]:
        corpus = Corpus(CorpusConfig(kind="interleaved", prefix=self.folder / "corpus" / "corpus"), self.tokenizer)
        return corpus, Packer(corpus, RowFormat(sequence_length=64, num_latents=4), self.tokenizer, skip_misfits=True)

    def make_plan(self) -> EpochPlan:
        _, packer = self.open_corpus()
        return packer.plan(packer.documents, "best_fit")

    def read_corpus(self) -> Any:
        """Return the rows under two packings, and the pictures."""
        corpus, packer = self.open_corpus()
        rows = []
        for packing in ("concatenate", "best_fit"):
            plan = packer.plan(packer.documents, packing)
            rows += [packer.row(plan, number).input_ids.tolist() for number in range(plan.num_rows)]
        assert corpus.images is not None
        return rows, [corpus.images.read(image) for image in range(corpus.images.num_images)]

    def read_plan(self) -> EpochPlan:
        store = PlanStore(self.folder / "plans")
        store.summary("k", 0)
        return store.plan("k", 0, self.make_plan)

    def outcome(self, seed: int) -> str:
        """Return how a case ended: refused, same, other, or what escaped."""
        draw = random.Random(seed)
        path = draw.choice(self.files)
        data = bytearray(self.contents[path])
        damage(draw, data)
        path.write_bytes(data)
        manifest = self.folder / "corpus" / "corpus.manifest.json"
        if path.parent == manifest.parent and path != manifest and draw.random() < 0.8:
            fields = json.loads(self.contents[manifest])
            fields["files"][path.name]["bytes"] = len(data)  # else the size alone tells
            manifest.write_text(json.dumps(fields))
        try:
            return f"{path.name}: {self._read(path)}"
        except DataError as error:
            is_told = path.name in str(error) or str(self.folder) in str(error) or "picture is cut off" in str(error)
            return f"{path.name}: {'refused' if is_told else f'not told where: {error}'}"
        except Exception as error:
            return f"seed {seed}, {path.name}: {error!r}"
        finally:
            for changed in (path, manifest):
                changed.unlink(missing_ok=True)  # open maps keep what they had
                changed.write_bytes(self.contents[changed])

    def _read(self, path: Path) -> str:
        if path.parent.name == "plans":
            plan = self.read_plan()
            names = ("documents", "piece_starts", "offsets", "row_starts", "row_stops")
            is_same = all(np.array_equal(getattr(plan, name), getattr(self.plan, name)) for name in names)
            summary = PlanStore(self.folder / "plans").summary("k", 0)
            return "same" if is_same and (summary is None or summary.num_rows == self.plan.num_rows) else "other"
        if path.parent.name == "tokenizer":
            text = "some text\nin lines"
            same = KosmosTokenizer.load(path.parent).encode(text) == self.tokenizer.encode(text)
            return "same" if same else "other"
        return "same" if self.read_corpus() == self.expected else "other"


if __name__ == "__main__":
    fuzzer = Fuzzer(Path(sys.argv[1]))
    limit_memory(MEGABYTES)
    json.dump(Counter(fuzzer.outcome(seed) for seed in range(int(sys.argv[2]), int(sys.argv[3]))), sys.stdout)
