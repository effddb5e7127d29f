"""The doctor with real processes: nodes that are pretended by number and name, a real store, real ranks on gloo."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kosmos.engine.doctor.all_reduce import ON_CPU, Trial, contribution, try_collectives
from megatron_kosmos.engine.doctor.checks import Check, Status
from megatron_kosmos.engine.doctor.examine import examine
from megatron_kosmos.engine.doctor.facts import SumFacts
from megatron_kosmos.engine.doctor.judge_sums import judge_sums
from megatron_kosmos.engine.doctor.meeting import Meeting, NoMeetingError, Place
from megatron_kosmos.engine.doctor.patient import Wanted
from megatron_kosmos.engine.doctor.workers import Gathering, Workers
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
CONTEXT = multiprocessing.get_context("fork")
TRIAL = replace(ON_CPU, sum_bytes=(4096, 65536), link_bytes=65536)
DEAD_SECONDS = 3.0
"""Timeout of a test in which something never comes."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def place(node: int, num_nodes: int, port: int) -> Place:
    return Place(node, num_nodes, f"n{node}", "localhost", port, tuple(f"n{one}" for one in range(num_nodes)))


def examine_job(wanted: Sequence[Wanted]) -> list[tuple[bool, list[Check]]]:
    """Examine nodes, one process each, and return what each says at the end."""
    port, pipes = free_port(), list[Connection]()
    for node, one in enumerate(wanted):
        ours, theirs = CONTEXT.Pipe()
        CONTEXT.Process(target=examine_one, args=(theirs, place(node, len(wanted), port), one)).start()
        pipes.append(ours)
    told = [json.loads(pipe.recv_bytes()) for pipe in pipes]
    return [
        (good, [Check(subject, Status(status), *texts) for subject, status, *texts in checks]) for good, checks in told
    ]


def examine_one(pipe: Connection, place: Place, wanted: Wanted) -> None:
    findings = examine(place, wanted)
    checks = [(check.subject, int(check.status), check.found, check.remedy) for check in findings.checks]
    pipe.send_bytes(json.dumps((findings.is_good, checks)).encode())


def bad(checks: Sequence[Check]) -> str:
    """What is bad, in one text."""
    return "\n".join(f"{check.found} | {check.remedy}" for check in checks if check.status == Status.BAD)


def test_two_good_nodes(tmp_path: Path) -> None:
    wanted = Wanted(num_workers=2, on_cpu=True, run_dir=tmp_path / "run", timeout_seconds=60)
    (leads, checks), (follows, rest) = examine_job([wanted, wanted])
    assert leads, bad(checks)
    assert follows
    assert rest == []
    subjects = {check.subject for check in checks}
    assert subjects >= {"versions", "shared folder", "disk", "clocks", "all-reduce", "links", "computing"}
    (sums,) = [check.found for check in checks if check.subject == "all-reduce"]
    assert sums.startswith("4 ranks, sums right; 4.1 kB in ")
    assert not (tmp_path / "run" / ".doctor").exists()


def test_a_bad_node_among_two_is_named_and_both_end_alike(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    good = Wanted(num_workers=1, on_cpu=True, run_dir=tmp_path, timeout_seconds=60)
    lost = replace(good, run_dir=tmp_path / "file" / "run", refusal="no such file: kosmos1.yaml")
    (leads, checks), (follows, rest) = examine_job([good, lost])
    assert not leads
    assert not follows
    assert rest == []
    assert f"n1: {tmp_path}/file/run" in bad(checks)
    assert "n1: no such file: kosmos1.yaml" in bad(checks)
    assert [check.found for check in checks if check.subject == "all-reduce"] == ["not tried, for what is bad above"]


def test_a_node_that_never_comes_is_named(tmp_path: Path) -> None:
    wanted = Wanted(num_workers=1, on_cpu=True, run_dir=tmp_path, timeout_seconds=DEAD_SECONDS)
    findings = examine(place(0, 2, free_port()), wanted)
    assert not findings.is_good
    assert "n1 didn't come within 3 s" in bad(findings.checks)


@pytest.mark.parametrize(
    "head, words",
    [("no-such-head.invalid", "can't be resolved here .* Set MASTER_ADDR"), ("127.0.0.1", "nothing answers at 127")],
)
def test_a_first_node_that_cant_be_found(head: str, words: str) -> None:
    with pytest.raises(NoMeetingError, match=words):
        Meeting(replace(place(1, 2, free_port()), head=head), timeout_seconds=1)


def test_a_port_that_is_taken() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = int(other.getsockname()[1])
        with pytest.raises(NoMeetingError, match=rf"port {port} can't be opened.*set another --port"):
            Meeting(place(0, 2, port), timeout_seconds=60)


def sums_of(rank_with_fault: int, trial: Trial, is_wrong: bool) -> SumFacts:
    """What each rank does: one of them sends wrong data, or has another trial than the rest."""
    is_faulty = dist.get_rank() == rank_with_fault

    def wrong(rank: int, num_elements: int, device: torch.device) -> Tensor:
        sent = contribution(rank, num_elements, device)
        sent[num_elements // 2] += 1
        return sent

    return try_collectives(
        trial if is_faulty else TRIAL,
        torch.device("cpu"),
        neighbour_distance=1,
        say=lambda _: None,
        contribute=wrong if is_faulty and is_wrong else contribution,
    )


def rank_name(rank: int) -> str:
    return f"rank {rank} (n{rank // 2})"


def test_a_rank_that_sends_wrong_data_is_named() -> None:
    (check,) = judge_sums(run_ranks(sums_of, 4, 2, TRIAL, True), rank_name)
    assert check.status == Status.BAD
    assert "sums are wrong: data of rank 2 (n1) arrive changed" in check.found


def test_a_slow_rank_is_named() -> None:
    ranks = run_ranks(sums_of, 4, 3, replace(TRIAL, num_products=30 * TRIAL.num_products), False)
    (computing,) = [check for check in judge_sums(ranks, rank_name) if check.subject == "computing"]
    assert computing.status == Status.WARN
    assert computing.found.startswith("the slowest is rank 3 (n1): ")


def test_a_slow_link_is_laid_to_the_rank_at_both_its_ends() -> None:
    ranks: list[SumFacts] = run_ranks(sums_of, 4, 0, TRIAL, False)
    # As rank 2's network card would have it: it receives slowly, and rank 3 gets what it sends slowly.
    slow = [replace(rank, link_seconds=1.0 if number in (2, 3) else 0.1) for number, rank in enumerate(ranks)]
    (links,) = [check for check in judge_sums(slow, rank_name) if check.subject == "links"]
    assert links.status == Status.WARN
    assert links.found.startswith("the slowest is rank 2 (n1): ")


@pytest.mark.parametrize("fault, told", [(signal.SIGKILL, "ended by itself"), (signal.SIGSTOP, "no answer within")])
def test_a_rank_that_dies_or_freezes_is_named(fault: signal.Signals, told: str) -> None:
    meeting = Meeting(place(0, 1, 0), timeout_seconds=60)
    gathering = Gathering(meeting.address, meeting.port, 0, 2, 1, timeout_seconds=DEAD_SECONDS)
    with Workers(2, on_cpu=True) as workers:
        assert [device.error for device in workers.devices(timeout_seconds=60)] == ["", ""]
        os.kill(workers.process_ids[1], fault)
        ranks = workers.sums(gathering)
    (check,) = judge_sums(ranks, rank_name)
    assert check.status == Status.BAD
    assert f"rank 1 (n0), starting: {told}" in check.found.replace("the process ", "")
    assert "rank 0" not in check.found


def command(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "megatron_kosmos", "doctor", *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **environment},
        text=True,
        capture_output=True,
        check=False,
        timeout=200,
    )


def test_the_command_loads_torch_only(tmp_path: Path) -> None:
    done = command("--run-dir", str(tmp_path), "--gpus", "2", "--cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fit to train, 0 bad" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "torch.distributed" in loaded
    assert not loaded & {"deepspeed", "megatron.core", "transformers"}


def test_gpus_that_are_asked_for_and_not_there_are_bad(tmp_path: Path) -> None:
    done = command("--run-dir", str(tmp_path), "--gpus", "1", CUDA_VISIBLE_DEVICES="", SLURMD_NODENAME="node7")
    assert done.returncode == 1
    assert "node7, local rank 0: " in done.stdout


@pytest.mark.parametrize(
    "options, words",
    [
        (("--nodes", "2"), "several nodes need --gpus"),
        (("--nodes", "2", "--gpus", "8", "--port", "29500", "--node", "2"), "below --nodes"),
        (("--nodes", "2", "--gpus", "8", "--port", "29500", "--names", "n0"), "--names has 1 names"),
        (("training.steps=1",), "changes a setting of a --config"),
    ],
)
def test_options_that_dont_fit_each_other(options: tuple[str, ...], words: str) -> None:
    from typer.testing import CliRunner

    from megatron_kosmos.cli.main import build_app

    result: Any = CliRunner().invoke(build_app(), ["doctor", *options], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert words in result.output
