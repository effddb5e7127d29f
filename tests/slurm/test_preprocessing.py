"""Preparing a corpus as a job array: with its merge, what one process makes."""

import hashlib
import re
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.runs import ROW_FORMAT, TinyData

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]
SIZES = [
    *("--part-megabytes", "1", "--num-latents", str(ROW_FORMAT.num_latents)),
    *("--sequence-length", str(ROW_FORMAT.sequence_length)),
]


def digests(prefix: Path) -> dict[str, str]:
    """SHA-256 of each file of a corpus, by what its name ends in."""
    files = [path for path in prefix.parent.glob(f"{prefix.name}*") if path.is_file()]
    return {path.name.removeprefix(prefix.name): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_an_array_and_its_merge_make_the_corpus_of_one_process(
    cluster: Cluster, data: TinyData, tmp_path: Path
) -> None:
    corpus = tmp_path / "captions"
    options = ["--input", str(data.captions), "--output", str(corpus), "--tokenizer", str(data.tokenizer), *SIZES]
    script = ["bash", "launch/preprocess_array.sh", "captions", *options]
    told = cluster.call(*script, environment={"TASKS": "3", "CPUS": "1", "MEMORY": "1G", "TIME": "00:30:00"})
    (number,) = re.findall(r"merged by job (\d+)", told)
    merge = cluster.job(number)
    assert merge.finish() == "COMPLETED", told
    logs = sorted((tmp_path / "captions.logs").glob("[0-2]-*.out"))
    assert all("parts" in log.read_text() and "there are fewer" not in log.read_text() for log in logs), logs
    assert len(logs) == 3
    assert digests(corpus) == digests(data.folder / "captions")
    assert len(digests(corpus)) >= 4
