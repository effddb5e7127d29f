"""A corpus is the same to the byte however it was prepared: at once, by shards, with interruptions, by any workers."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_kosmos.data.corpora.image_store import ImageStore
from megatron_kosmos.data.corpora.indexed import IndexedReader
from megatron_kosmos.data.corpora.manifest import read_manifest
from megatron_kosmos.data.errors import BadDocument, DataError
from megatron_kosmos.data.filters import Filters
from megatron_kosmos.data.preparation.preprocess import Preparation, merge, plan_of, prepare, prepare_shard
from megatron_kosmos.prompt import SourceKind
from tests.unit.data.preparation.part_inputs import PART_BYTES, files_in, make_inputs

KINDS: list[SourceKind] = ["text", "caption", "interleaved"]
Make = Callable[..., Preparation]


@pytest.fixture
def make(memory_path: Path, tokenizer_folder: Path, picture: Callable[..., bytes]) -> Make:
    """Returns a preparation in small parts, to a folder that is named."""

    def preparation(kind: SourceKind, name: str, **settings: Any) -> Preparation:
        inputs = make_inputs(memory_path / "in", kind, picture)
        chosen = {"max_shard_bytes": 10_000, "part_bytes": PART_BYTES[kind], **settings}
        return Preparation(kind, inputs, memory_path / name / "corpus", tokenizer_folder, **chosen)

    return preparation


@pytest.mark.parametrize("kind", KINDS)
def test_workers_shards_and_their_order_do_not_matter(make: Make, kind: SourceKind) -> None:
    whole = make(kind, "whole")
    manifest = prepare(whole)
    expected = files_in(whole.output.parent)
    num_parts = plan_of(whole.job()).num_parts
    assert num_parts > 5
    assert manifest.skipped
    assert (sum(name.endswith(".tar") for name in expected) > 3) == (kind != "text")

    many_workers = make(kind, "workers", num_workers=3)
    prepare(many_workers)
    assert files_in(many_workers.output.parent) == expected
    for num_shards in (1, 2, 5):
        sharded = make(kind, f"shards{num_shards}")
        parts = [prepare_shard(sharded, shard, num_shards) for shard in reversed(range(num_shards))]
        assert [part for shard in reversed(parts) for part in shard] == list(range(num_parts))
        assert merge(sharded.output) == manifest
        assert files_in(sharded.output.parent) == expected
        assert merge(sharded.output) == manifest  # once more does nothing
        assert prepare_shard(sharded, 0, num_shards) == parts[-1]
        assert files_in(sharded.output.parent) == expected


def test_parts_hold_the_documents_in_order(make: Make) -> None:
    """Against the corpus that is made of one part, as one process without parts would write it."""
    for kind in KINDS:
        parts, single = make(kind, f"{kind}-parts"), make(kind, f"{kind}-single", part_bytes=1 << 30)
        manifests = prepare(parts), prepare(single)
        ignored = {"settings", "files"}
        assert manifests[0].model_dump(exclude=ignored) == manifests[1].model_dump(exclude=ignored)
        for suffix in (".bin", ".idx", ".quarantine.jsonl"):
            assert Path(f"{parts.output}{suffix}").read_bytes() == Path(f"{single.output}{suffix}").read_bytes()
        if kind != "text":
            stores = ImageStore(parts.output), ImageStore(single.output)
            assert stores[0].first_images.tolist() == stores[1].first_images.tolist()
            assert stores[0].positions.tolist() == stores[1].positions.tolist()
            for number in range(manifests[0].images):
                assert stores[0].read(number) == stores[1].read(number)
        theirs, ours = IndexedDataset(str(parts.output)), IndexedReader(parts.output)
        assert [document.tolist() for document in theirs] == [ours[number].tolist() for number in range(len(ours))]


def test_a_rerun_does_only_what_is_missing(make: Make) -> None:
    wanted = make("caption", "out")
    num_parts = plan_of(wanted.job()).num_parts
    prepare_shard(wanted, 0, 2)
    kept = {path: path.stat().st_ino for path in wanted.output.parent.rglob("tokens.bin")}
    assert len(kept) == num_parts // 2
    progress: list[tuple[int, int, int]] = []
    prepare_shard(wanted, 0, 1, lambda *counts: progress.append(counts))
    assert {path: path.stat().st_ino for path in kept} == kept
    total = sum(file.stat().st_size for file in wanted.inputs)
    done = num_parts // 2 * PART_BYTES["caption"]
    assert progress[num_parts // 2 - 1][:2] == (done, total)  # what was done before counts at once
    assert [done for done, _, _ in progress] == sorted(done for done, _, _ in progress)
    assert progress[-1] == (total, total, merge(wanted.output).documents)

    before = {path: path.stat().st_mtime_ns for path in wanted.output.parent.rglob("*")}
    progress.clear()
    assert prepare(wanted, lambda *counts: progress.append(counts)) == read_manifest(wanted.output)
    assert progress == []
    assert {path: path.stat().st_mtime_ns for path in wanted.output.parent.rglob("*")} == before


@pytest.mark.parametrize(
    "changes, difference",
    [
        ({"filters": Filters(max_images=1)}, "settings.filters.max_images was None, is 1"),
        ({"max_shard_bytes": 9}, "settings.max_shard_bytes was 10000, is 9"),
        ({"part_bytes": 777}, "settings.part_bytes was 1500, is 777"),
        ({"kind": "interleaved"}, "kind was 'text', is 'interleaved'"),
    ],
)
def test_other_arguments_are_refused(make: Make, changes: dict[str, Any], difference: str) -> None:
    wanted = make("text", "out")
    first = replace(wanted, inputs=wanted.inputs[:1])
    other = replace(first, **changes)
    prepare_shard(first, 0, 2)
    before = files_in(wanted.output.parent)
    for attempt in (prepare, lambda wanted: prepare_shard(wanted, 1, 2)):
        with pytest.raises(DataError, match=rf"are those of another preparation: {re.escape(difference)}; go on with"):
            attempt(other)
    with pytest.raises(DataError, match="or delete that folder"):  # shards may not delete what others write
        prepare_shard(replace(other, overwrite=True), 1, 2)
    assert files_in(wanted.output.parent) == before
    if "kind" not in changes:
        prepare(replace(other, overwrite=True))
        assert not read_manifest(first.output).differences(other.job())
        prepare(replace(first, overwrite=True))
        with pytest.raises(DataError, match=rf"already, another one: {re.escape(difference)}; give --overwrite"):
            prepare(other)


def test_an_input_that_changed_is_refused(make: Make) -> None:
    wanted = make("text", "out")
    prepare_shard(wanted, 0, 2)
    with wanted.inputs[0].open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match=r"another preparation: source_bytes\[0\] was \d+, is \d+;"):
        prepare(wanted)


def test_merge_names_what_is_missing(make: Make) -> None:
    wanted = make("text", "out")
    num_parts = plan_of(wanted.job()).num_parts
    with pytest.raises(DataError, match=r"there are no parts at .*; write them with --shard-index"):
        merge(wanted.output)
    for shard in (0, 2, 3):
        prepare_shard(wanted, shard, 5)
    assert num_parts == 7
    message = r"3 of the 7 parts in .* are not there: 1, 5-6 \(part 1: missing\); run again --num-shards 5 with "
    with pytest.raises(DataError, match=message + "--shard-index 1,4$"):
        merge(wanted.output)
    prepare_shard(wanted, 4, 5)
    with pytest.raises(DataError, match=r"--shard-index 1$"):
        merge(wanted.output)
    prepare(wanted)  # alone does the rest, too
    assert files_in(wanted.output.parent).keys() >= {"corpus.bin", "corpus.idx"}


def test_merge_replaces_a_corpus_only_when_asked(make: Make) -> None:
    old, wanted = make("caption", "out", max_shard_bytes=1), make("caption", "out", overwrite=True)
    prepare(old)
    before = files_in(old.output.parent)
    prepare_shard(wanted, 0, 1)
    assert {name: data for name, data in files_in(old.output.parent).items() if "/" not in name} == before
    with pytest.raises(DataError, match=r"there is a corpus at .* already, another one"):
        merge(wanted.output)
    merge(wanted.output, overwrite=True)
    expected = make("caption", "expected")
    prepare(expected)
    assert files_in(wanted.output.parent) == files_in(expected.output.parent)


@pytest.mark.parametrize(
    "name, damage",
    [
        ("images-00000.tar", "missing"),
        ("tokens.bin", "truncated"),
        ("part.json", "account"),
        ("tokens.bin", "changed"),
        ("images.table", "changed"),
    ],
)
def test_a_damaged_part_is_done_again_or_refused(make: Make, name: str, damage: str) -> None:
    wanted, expected = make("caption", "out"), make("caption", "expected")
    prepare(expected)
    prepare_shard(wanted, 0, 1)
    part = wanted.output.with_name("corpus.parts") / "000001"
    match damage:
        case "missing":
            (part / name).unlink()
        case "truncated":
            (part / name).write_bytes((part / name).read_bytes()[:-1])
        case "account":
            (part / "part.json").write_text("{}")
        case "changed":
            data = bytearray((part / name).read_bytes())
            data[3] ^= 1
            (part / name).write_bytes(data)
            with pytest.raises(DataError, match=rf"000001/{name} is damaged: .*delete the folder"):
                merge(wanted.output)
            shutil.rmtree(part)
    if damage != "changed":
        with pytest.raises(DataError, match=r"1 of the \d+ parts in .* are not there: 1 \(part 1: .*--shard-index 0"):
            merge(wanted.output)
    prepare_shard(wanted, 0, 1)
    merge(wanted.output)
    assert files_in(wanted.output.parent) == files_in(expected.output.parent)


@pytest.mark.parametrize("kind, num_workers", [*((kind, 1) for kind in KINDS), ("caption", 2)])
def test_strict_stops_at_the_first_in_order(make: Make, kind: SourceKind, num_workers: int) -> None:
    lenient = make(kind, "lenient")
    prepare(lenient)
    first = lenient.output.with_name("corpus.quarantine.jsonl").read_bytes().splitlines()[0]
    strict = make(kind, "strict", strict=True, num_workers=num_workers)
    with pytest.raises(BadDocument) as caught:
        prepare(strict)
    assert f'"origin": "{caught.value.origin}", "reason": "{caught.value.reason}"'.encode() in first
    with pytest.raises(BadDocument) as of_finished:  # a corpus that is there is held to it as well
        prepare(replace(lenient, strict=True))
    assert str(of_finished.value) == str(caught.value)

    for shard in (1, 0):  # parts that are done make no difference: those behind it, and all of them
        prepare_shard(replace(strict, strict=False), shard, 2)
        with pytest.raises(BadDocument) as again:
            prepare(strict)
        assert str(again.value) == str(caught.value)
    prepare(replace(strict, strict=False))
    assert files_in(strict.output.parent) == files_in(lenient.output.parent)


def test_a_part_that_another_process_deletes(make: Make) -> None:
    """As one on another machine does that is started for the same parts: it cannot see that this one is alive."""
    wanted = make("caption", "out")

    def delete(*counts: int) -> None:
        for partial in wanted.output.with_name("corpus.parts").glob("*.partial-*"):
            shutil.rmtree(partial)

    with pytest.raises(DataError, match=r"000000\.partial-.* has vanished: another process prepares"):
        prepare_shard(wanted, 0, 1, delete)
    prepare(wanted)


def test_two_processes_may_do_the_same_part(make: Make) -> None:
    """The one that is later finds the part in place, and keeps it."""
    wanted, expected = make("caption", "out"), make("caption", "expected")
    prepare(expected)
    during: list[tuple[int, int, int]] = []

    def finish_first(*counts: int) -> None:
        if not during:
            during.append((0, 0, 0))
            parts = wanted.output.with_name("corpus.parts")
            (writing,) = parts.glob("000000.partial-*")
            writing.rename(parts / "aside")  # as if it had another process's name
            prepare_shard(wanted, 0, 1)
            (parts / "aside").rename(writing)

    prepare_shard(wanted, 0, 1, finish_first)
    merge(wanted.output)
    assert files_in(wanted.output.parent) == files_in(expected.output.parent)
