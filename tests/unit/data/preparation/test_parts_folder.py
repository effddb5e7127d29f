"""The folder of the parts, which processes on several machines share without seeing each other."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_kosmos.data.preparation import parts_folder
from megatron_kosmos.data.preparation.preprocess import Preparation, merge, prepare_shard


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
