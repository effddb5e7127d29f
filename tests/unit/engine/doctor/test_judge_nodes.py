"""Judgements on nodes: this machine's real facts, altered as a bad node would have them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.doctor.checks import Check, Status
from megatron_kosmos.engine.doctor.facts import DeviceFacts, FolderFacts, NodeFacts, Wire
from megatron_kosmos.engine.doctor.judge_nodes import (
    Needs,
    judge_clocks,
    judge_devices,
    judge_folder,
    judge_kernels,
    judge_memory,
    judge_run,
    judge_versions,
)
from megatron_kosmos.engine.doctor.meeting import ClockOffset
from megatron_kosmos.engine.doctor.memory import available_memory, free_shared_memory
from megatron_kosmos.engine.doctor.versions import unfit_here, versions_here
from megatron_kosmos.model.kernels import LIBRARIES, Obstacle
from tests.distributed.tiny import tiny_run

GB = 10**9
H100 = DeviceFacts("H100", 80 * GB, 79 * GB, obstacles=(Obstacle.NONE,) * len(LIBRARIES))
NEEDS = Needs(disk=100 * GB, disk_at_end=500 * GB, gpu=40 * GB, host=GB)


@pytest.fixture(scope="module")
def nodes() -> list[NodeFacts]:
    """Three nodes with this machine's libraries, two GPUs each."""
    here = NodeFacts(
        node=0,
        name="n0",
        versions=versions_here(),
        unfit=unfit_here(),
        devices=(H100, replace(H100, obstacles=())),
        num_gpus=2,
        available_memory=500 * GB,
        shared_memory=64 * GB,
        folder=FolderFacts(free_bytes=900 * GB, token="t0"),
    )
    return [here, replace(here, node=1, name="n1"), replace(here, node=2, name="n2")]


def altered(nodes: Sequence[NodeFacts], node: int, **changes: object) -> list[NodeFacts]:
    return [replace(one, **changes) if one.node == node else one for one in nodes]  # type: ignore[arg-type]


def only(checks: list[Check], status: Status) -> Check:
    """The one check that has this status."""
    (found,) = [check for check in checks if check.status == status]
    assert found.remedy
    return found


def all_checks(nodes: list[NodeFacts]) -> list[Check]:
    return [
        *judge_versions(nodes),
        *judge_devices(nodes, on_cpu=False),
        *judge_kernels(nodes, None),
        *judge_memory(nodes, NEEDS),
        *judge_folder(nodes, {0: [], 1: [], 2: []}, NEEDS),
        *judge_clocks({0: "n0", 1: "n1"}, {1: ClockOffset(0.01, 0.001)}),
        *judge_run(nodes),
    ]


def test_nodes_that_are_alike_and_have_enough_are_good(nodes: list[NodeFacts]) -> None:
    checks = all_checks(nodes)
    assert {check.subject for check in checks} >= {"versions", "GPUs", "kernels", "GPU memory", "disk", "clocks", "run"}
    assert [check for check in checks if check.status != Status.GOOD] == []


def test_what_a_node_tells_arrives_unchanged(nodes: list[NodeFacts]) -> None:
    wire = Wire(NodeFacts)
    assert wire.read(wire.write(nodes[0])) == nodes[0]


def test_this_machine_has_what_the_package_needs() -> None:
    assert unfit_here() == ()
    assert {"python", "torch", "megatron-core", "deepspeed", "transformers", "code"} <= versions_here().keys()
    assert available_memory() > 0
    assert free_shared_memory() > 0


@pytest.mark.parametrize("package, version", [("torch", "2.9.1"), ("code", "0123456789ab"), ("deepspeed", None)])
def test_a_node_with_another_version_is_named(nodes: list[NodeFacts], package: str, version: str | None) -> None:
    others = {name: known for name, known in nodes[0].versions.items() if name != package}
    versions = others if version is None else {**others, package: version}
    bad = only(judge_versions(altered(nodes, 1, versions=versions)), Status.BAD)
    assert f"{package} differs" in bad.found
    assert f"{version or 'absent'} on n1" in bad.found
    assert "on n0, n2" in bad.found


def test_another_driver_is_no_reason_to_stop(nodes: list[NodeFacts]) -> None:
    """Clusters renew drivers node by node, and they work together."""
    driven = [replace(node, versions={**node.versions, "driver": "570.1"}) for node in nodes]
    other = altered(driven, 1, versions={**driven[0].versions, "driver": "575.2"})
    assert only(judge_versions(other), Status.WARN).found == "driver differs: 570.1 on n0, n2; 575.2 on n1"


def test_of_many_nodes_the_first_are_named(nodes: list[NodeFacts]) -> None:
    many = [replace(nodes[0], node=number, name=f"n{number}", unfit=("apex 0",)) for number in range(10)]
    bad = only(judge_versions(many), Status.BAD)
    assert bad.found == "n0, n1, n2, n3, n4, n5, n6, n7, and 2 more: apex 0"


def test_a_library_out_of_range_is_named_with_the_range(nodes: list[NodeFacts]) -> None:
    bad = only(judge_versions(altered(nodes, 2, unfit=("deepspeed 0.18.0 (needed: >=0.19.8)",))), Status.BAD)
    assert bad.found == "n2: deepspeed 0.18.0 (needed: >=0.19.8)"


def test_a_gpu_that_fails_is_named(nodes: list[NodeFacts]) -> None:
    broken = (H100, DeviceFacts(error="CUDA error: uncorrectable ECC error encountered"))
    bad = only(judge_devices(altered(nodes, 1, devices=broken), on_cpu=False), Status.BAD)
    assert bad.found == "n1, local rank 1: CUDA error: uncorrectable ECC error encountered"


def test_a_node_with_too_few_gpus_is_named(nodes: list[NodeFacts]) -> None:
    assert only(judge_devices(altered(nodes, 2, num_gpus=1), on_cpu=False), Status.BAD).found.startswith("n2 has 1")


def test_gpus_of_two_kinds_and_gpus_in_use_are_told(nodes: list[NodeFacts]) -> None:
    mixed = altered(nodes, 1, devices=(replace(H100, name="A100"), H100))
    assert "A100 on n1" in only(judge_devices(mixed, on_cpu=False), Status.WARN).found
    used = altered(nodes, 1, devices=(H100, replace(H100, free_bytes=GB)))
    assert "n1, GPU 1: 1.0 GB free" in only(judge_devices(used, on_cpu=False), Status.WARN).found


def test_memory_is_held_against_the_plan(nodes: list[NodeFacts]) -> None:
    small = altered(nodes, 1, devices=(replace(H100, total_bytes=24 * GB), H100))
    assert "n1: " in only(judge_memory(small, NEEDS), Status.BAD).found
    assert only(judge_memory(nodes, replace(NEEDS, gpu=70 * GB)), Status.WARN).subject == "GPU memory"
    assert only(judge_memory(altered(nodes, 2, available_memory=GB), None), Status.WARN).found.startswith("n2: 1.0 GB")
    # Docker's default
    assert only(judge_memory(altered(nodes, 0, shared_memory=64 << 20), None), Status.WARN).subject == "/dev/shm"


def test_a_disk_that_is_too_small_is_named(nodes: list[NodeFacts]) -> None:
    small = altered(nodes, 1, folder=FolderFacts(free_bytes=30 * GB, token="t1"))
    bad = only(judge_folder(small, {}, NEEDS), Status.BAD)
    assert bad.found == "n1: 30.0 GB free"
    assert "100.0 GB are needed" in bad.remedy
    assert all(check.status == Status.GOOD for check in judge_folder(small, {}, None))
    # A run that goes on has most of its checkpoints already.
    goes_on = altered(nodes, 1, folder=FolderFacts(free_bytes=30 * GB, held_bytes=75 * GB, token="t1"))
    assert only(judge_folder(goes_on, {}, NEEDS), Status.WARN).found == "n1: 30.0 GB free, 75.0 GB in checkpoints"
    # It can begin, and what is kept for good fills the disk later.
    warned = only(judge_folder(altered(nodes, 1, folder=FolderFacts(free_bytes=499 * GB)), {}, NEEDS), Status.WARN)
    assert "500.0 GB are needed until the end" in warned.remedy
    assert all(check.status == Status.GOOD for check in judge_folder(nodes, {}, NEEDS))


def test_a_node_apart_from_the_shared_folder_is_named(nodes: list[NodeFacts]) -> None:
    bad = only(judge_folder(nodes, {0: [1], 1: [0, 2], 2: [1]}, NEEDS), Status.BAD)
    assert "look at n1:" in bad.remedy
    assert "n1 doesn't see n0, n2" in bad.found
    refused = altered(nodes, 2, folder=FolderFacts(error="/runs/a: [Errno 13] Permission denied"))
    assert only(judge_folder(refused, {0: [], 1: []}, NEEDS), Status.BAD).found.startswith("n2: /runs/a")


@pytest.mark.parametrize("seconds, status, side", [(1.9, Status.WARN, "ahead"), (-3600.0, Status.BAD, "behind")])
def test_a_clock_that_is_off_is_named(seconds: float, status: Status, side: str) -> None:
    names = {0: "n0", 1: "n1", 2: "n2"}
    found = only(judge_clocks(names, {1: ClockOffset(0.0, 0.1), 2: ClockOffset(seconds, 0.1)}), status).found
    assert found == f"n2 is {abs(seconds):.1f} s {side}"


def test_a_slow_answer_is_no_clock_that_is_off() -> None:
    (check,) = judge_clocks({0: "n0", 1: "n1"}, {1: ClockOffset(2.5, 2.4)})
    assert check.status == Status.GOOD


def test_a_run_that_is_refused_on_one_node_names_it(nodes: list[NodeFacts]) -> None:
    bad = only(judge_run(altered(nodes, 1, refusal="no tokenizer at /data/t5")), Status.BAD)
    assert bad.found == "n1: no tokenizer at /data/t5"


def test_a_kernel_that_one_node_lacks_is_used_by_none(nodes: list[NodeFacts], tmp_path: Path) -> None:
    flash = list(LIBRARIES).index(("attention", "flash"))
    obstacles = tuple(Obstacle.ABSENT if number == flash else Obstacle.NONE for number in range(len(LIBRARIES)))
    lacking = altered(nodes, 1, devices=(replace(H100, obstacles=obstacles), H100))
    told = only(judge_kernels(lacking, None), Status.WARN)
    assert "kernels.attention=flash is not there on n1 only: none will use it" in told.found
    assert "pip install" in told.remedy
    run: RunConfig = tiny_run(training__precision="bf16", kernels__attention="flash")
    assert "kernels.attention=flash" in only(judge_kernels(lacking, run), Status.BAD).found
    assert "in use: attention flash" in judge_kernels(nodes, run)[0].found
