"""A plan is made once and then read by all; whatever happens to its files, the same plan comes out."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_kosmos.data.loading.packed_rows import Packer
from megatron_kosmos.data.packing.plan_store import PlanStore, PlanSummary, plan_key
from megatron_kosmos.data.packing.planning import EpochPlan
from megatron_kosmos.data.packing.row_format import RowFormat
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from tests.unit.data.packing.made_corpora import Parts, make_corpus

NUM_DOCUMENTS = 1_000_000


@pytest.fixture
def packer(tokenizer: KosmosTokenizer, tmp_path: Path) -> Packer:
    documents: list[Parts] = [[7] * (number % 13) for number in range(100)]
    return Packer(
        make_corpus(tmp_path, "text", documents, tokenizer),
        RowFormat(sequence_length=16),
        tokenizer,
        skip_misfits=False,
    )


def must_not_plan() -> EpochPlan:
    raise AssertionError("the plan is there")


@pytest.fixture(params=["concatenate", "best_fit"])
def make(request: pytest.FixtureRequest, packer: Packer) -> Callable[[], EpochPlan]:
    return lambda: packer.plan(packer.documents, request.param)


def assert_same(plan: EpochPlan, other: EpochPlan) -> None:
    for name in ("documents", "piece_starts", "offsets", "row_starts", "row_stops"):
        assert np.array_equal(getattr(plan, name), getattr(other, name))


def test_others_find_the_plan(make: Callable[[], EpochPlan], tmp_path: Path) -> None:
    folder = tmp_path / "run" / "plans"
    made = PlanStore(folder).plan("k", 0, make)
    found = PlanStore(folder)
    assert_same(found.plan("k", 0, must_not_plan), made)
    assert found.summary("k", 0) == PlanSummary.of(make())
    assert found.summary("k", 1) is None
    with pytest.raises(AssertionError, match="the plan is there"):
        found.plan("k", 1, must_not_plan)


@pytest.mark.parametrize("damage", [b"", b"x" * 16, b"\xff" * 4096, None], ids=["empty", "short", "wrong", "cut"])
def test_a_damaged_plan_is_made_again(make: Callable[[], EpochPlan], tmp_path: Path, damage: bytes | None) -> None:
    expected = PlanStore(tmp_path / "plans").plan("k", 0, make)
    (file,) = (tmp_path / "plans").glob("*.plan")
    content = file.read_bytes()
    file.unlink()  # the open map keeps what it had
    file.write_bytes(content[:-8] if damage is None else damage)
    assert_same(PlanStore(tmp_path / "plans").plan("k", 0, make), expected)
    assert file.read_bytes() == content


@pytest.mark.parametrize("place", [0, 24, 500, -9, -1])
def test_a_changed_bit_of_a_plan_or_its_summary_is_seen(
    make: Callable[[], EpochPlan], tmp_path: Path, place: int
) -> None:
    """Other documents in a row would be another order of the data."""
    expected = PlanStore(tmp_path / "plans").plan("k", 0, make)
    plan, summary = tmp_path / "plans" / "k-epoch0.plan", tmp_path / "plans" / "k-epoch0.json"
    content = bytearray(plan.read_bytes())
    content[place] ^= 1
    plan.unlink()
    plan.write_bytes(content)
    assert_same(PlanStore(tmp_path / "plans").plan("k", 0, make), expected)
    changed = summary.read_text().replace(f'"num_rows":{expected.num_rows}', f'"num_rows":{expected.num_rows + 1}')
    assert changed != summary.read_text()
    summary.write_text(changed)
    assert PlanStore(tmp_path / "plans").summary("k", 0) is None


def test_plans_of_past_epochs_are_removed_and_still_summed_up(make: Callable[[], EpochPlan], tmp_path: Path) -> None:
    store = PlanStore(tmp_path / "plans")
    for epoch in range(4):
        store.plan("k", epoch, make)
    assert sorted(file.name for file in (tmp_path / "plans").glob("*.plan")) == ["k-epoch2.plan", "k-epoch3.plan"]
    assert all(PlanStore(tmp_path / "plans").summary("k", epoch) for epoch in range(4))
    assert not [file for file in (tmp_path / "plans").iterdir() if file.suffix not in {".plan", ".json", ".lock"}]


def test_a_folder_that_cannot_be_written_to(
    make: Callable[[], EpochPlan], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "plans").write_text("a file")
    store = PlanStore(tmp_path / "plans")
    assert_same(store.plan("k", 0, make), make())
    assert store.summary("k", 0) is not None
    assert "every process plans epoch 0 for itself" in caplog.text


def test_plans_of_other_settings_have_other_names() -> None:
    names = {plan_key("corpus", "best_fit", 1, 0), plan_key("corpus", "best_fit", 0, 1), plan_key("corpus", "b", 1, 0)}
    assert len(names) == 3


def anonymous_kilobytes() -> int:
    """Return the memory of this process that is no file's."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


def growth_in_a_fork(store: PlanStore) -> int:
    """Return the memory of its own, in kB, that a worker process needs for a plan."""

    def big() -> EpochPlan:
        starts = np.arange(NUM_DOCUMENTS + 1)
        return EpochPlan(starts[:-1].copy(), starts, starts[:-1].copy(), starts[:-1:10].copy(), starts[10::10].copy())

    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        before = anonymous_kilobytes()
        plan = store.plan("k", 0, big)
        assert int(plan.documents.sum()) > 0
        os.write(writing, str(anonymous_kilobytes() - before).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return int(pipe.read())


def test_a_worker_shares_the_memory_of_a_plan(tmp_path: Path) -> None:
    plan_size = NUM_DOCUMENTS * 8 * 3 // 1024
    store = PlanStore(tmp_path / "plans")
    assert growth_in_a_fork(PlanStore(None)) > 0.9 * plan_size
    growth_in_a_fork(store)  # plans
    assert growth_in_a_fork(store) < 0.1 * plan_size
