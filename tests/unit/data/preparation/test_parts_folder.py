"""The folder of the parts, which processes on several machines share without seeing each other."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_kosmos.data.errors import BadDocument, DataError
from megatron_kosmos.data.preparation import parts_folder
from megatron_kosmos.data.preparation.assembly import ASSEMBLED, build
from megatron_kosmos.data.preparation.parts_folder import PartsFolder
from megatron_kosmos.data.preparation.preprocess import Preparation, merge, prepare, prepare_shard


def test_hosts_whose_names_begin_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "node")
    mine, theirs = (tmp_path / f"000000.partial-{host}-{os.getppid()}" for host in ("node", "node-1"))
    for folder in (mine, theirs):
        folder.mkdir()
    parts_folder.remove_leftovers(tmp_path / "000000")
    assert mine.exists()
    assert not theirs.exists()


@pytest.mark.parametrize("there_before", [False, True])
def test_machines_that_begin_at_once(
    tmp_path: Path,
    tokenizer_folder: Path,
    write_lines: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    there_before: bool,
) -> None:
    """One that takes the other's new folder for a leftover costs it nothing."""
    put_in_place, deleted = parts_folder.put_in_place, list[Path]()

    def delete_first(new: Path, path: Path) -> None:
        if not deleted:
            deleted.append(new)
            shutil.rmtree(new)
            if there_before:
                prepare_shard(wanted, 1, 2)
        put_in_place(new, path)

    monkeypatch.setattr(parts_folder, "put_in_place", delete_first)
    file = write_lines("a.jsonl", ['{"text": "one"}', '{"text": "two"}'])
    wanted = Preparation("text", (file,), tmp_path / "out" / "corpus", tokenizer_folder, part_bytes=16)
    assert list(prepare_shard(wanted, 0, 2)) == [0]
    assert deleted[0].name.startswith("corpus.parts.partial-")
    prepare_shard(wanted, 1, 2)
    assert merge(wanted.output).documents == 2
    assert sorted(path.name for path in wanted.output.parent.iterdir()) == [
        "corpus.bin",
        "corpus.idx",
        "corpus.manifest.json",
    ]


def make_texts(folder: Path, tokenizer: Path, write_lines: Callable[..., Path]) -> Preparation:
    file = write_lines("a.jsonl", ['{"text": ""}', '{"text": "two"}'])
    return Preparation("text", (file,), folder / "out" / "corpus", tokenizer, part_bytes=13)


@pytest.mark.parametrize("has_shards", [False, True])
def test_a_failure_takes_nothing_from_shards(
    tmp_path: Path, tokenizer_folder: Path, write_lines: Callable[..., Path], has_shards: bool
) -> None:
    """The folder of parts goes with a preparation that wrote none, unless others have begun to."""
    wanted = make_texts(tmp_path, tokenizer_folder, write_lines)
    folder = PartsFolder(wanted.output)
    if has_shards:
        folder.create(wanted.job())
        folder.note_shards(2)
    with pytest.raises(BadDocument):
        prepare(replace(wanted, strict=True))
    assert (folder.job() is not None) == has_shards


@pytest.mark.parametrize("name", ["corpus.bin", "corpus.idx"])
def test_a_file_that_was_damaged_before_it_got_its_name(
    tmp_path: Path, tokenizer_folder: Path, write_lines: Callable[..., Path], name: str
) -> None:
    wanted = make_texts(tmp_path, tokenizer_folder, write_lines)
    num_parts = len(prepare_shard(wanted, 0, 1))
    folder = PartsFolder(wanted.output)
    build(folder, wanted.job(), num_parts)
    with (folder.path / ASSEMBLED / name).open("r+b") as file:
        file.truncate(1)
    with pytest.raises(DataError, match=rf"{name} is truncated: 1 bytes, expected \d+"):
        merge(wanted.output)
    assert not wanted.output.with_name("corpus.manifest.json").exists()
