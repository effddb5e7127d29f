"""Process groups that were left leave nothing behind."""

from megatron_kosmos.config import ParallelConfig
from megatron_kosmos.parallel.topology import build_topology, start_process_group, stop_process_group
from tests.distributed.harness import run_ranks


def place() -> str:
    return build_topology(ParallelConfig(), start_process_group(0, 1, local_rank=0)).describe()


def test_a_process_forked_after_groups_were_left_makes_its_own() -> None:
    here = place()
    stop_process_group()
    assert run_ranks(place, 1, timeout_seconds=20) == [here]
