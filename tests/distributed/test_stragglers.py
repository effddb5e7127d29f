"""Which rank computes slowest, told by the ranks' own seconds."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_kosmos.engine.builder import build_stage
from megatron_kosmos.engine.stragglers import StragglerReport
from megatron_kosmos.engine.train_step import StepRunner
from megatron_kosmos.engine.trainer import StepReport
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import rank_batches, tiny_run

pytestmark = pytest.mark.distributed

CPU = torch.device("cpu")


def report_rank(parallel: dict[str, Any]) -> tuple[list[dict[str, Any]], float, float]:
    """Return what is reported of made-up seconds, and of a real step those of computing and of its section."""
    run = tiny_run(logging__metrics_every=2, **parallel)
    topology = build_topology(run.parallel, CPU)
    runner = StepRunner(run, build_stage(run, topology)[0], topology)
    runner.evaluate(rank_batches(0, "timm", topology))
    result = runner.train(0, rank_batches(0, "timm", topology))
    reporting, rank = StragglerReport(run, CPU), torch.distributed.get_rank()
    reported = []
    for step, seconds in enumerate([(1.0, 1.0, 1.0, 1.0), (1.0, 3.0, 2.0, 2.0), (4.0, 1.0, 2.0, 3.0)], start=1):
        report = StepReport(step, step == 3, replace(result, compute_seconds=seconds[rank]), 1.0)
        reporting.after_step(report)
        reported.append(report.scalars)
    return reported, result.compute_seconds, runner.timers.collect()["seconds_forward_backward"]


@pytest.mark.parametrize(
    "parallel",
    [
        {"parallel__pipeline_parallel_size": 2, "parallel__virtual_pipeline_parallel_size": 2},
        {"parallel__zero_stage": 2},
    ],
    ids=["pp2_vpp2_dp2", "dp4_zero2"],
)
def test_the_slowest_rank_is_named(parallel: dict[str, Any]) -> None:
    ranks = run_ranks(report_rank, 4, parallel)
    assert ranks[0][0] == [
        {},
        {"rank_seconds_worst": 2.0, "rank_seconds_median": 1.5, "rank_slowest": 1},
        {"rank_seconds_worst": 4.0, "rank_seconds_median": 2.5, "rank_slowest": 0},
    ]
    assert ranks[1][0] == [{}, {}, {}]
    assert all(0 < computing < whole for _, computing, whole in ranks)
