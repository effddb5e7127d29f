"""The watchdog of one rank, in processes that stand still, and what ranks together make of it."""

import os
import signal
import threading
from pathlib import Path

import pytest

from megatron_kosmos.observability.hang_report import RankReport, verdict
from megatron_kosmos.observability.heartbeat import Heartbeat
from megatron_kosmos.observability.timers import Timers
from megatron_kosmos.observability.watchdog import EXIT_CODE, Watchdog


def stand_still(folder: Path, seconds: float, heartbeat: Heartbeat) -> int:
    """Return the exit code of a process that is watched while it waits in C; -9 when it was not ended."""
    child = os.fork()
    if child == 0:
        os.close(2)
        os.open(folder / "said", os.O_WRONLY | os.O_CREAT)
        watchdog = Watchdog(folder, 0, seconds, heartbeat)
        watchdog.start()
        watchdog.join(1, 1)
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()
    if not seconds:
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_rank_that_stands_still_is_ended_with_its_stacks(tmp_path: Path) -> None:
    heartbeat = Heartbeat()
    heartbeat.finish_step(12)
    with Timers(heartbeat).section("save"):
        assert stand_still(tmp_path, 0.05, heartbeat) == EXIT_CODE == 70
    stacks = (tmp_path / "hang" / "rank_00000.txt").read_text()
    assert '"steps": 12, "phase": "save"' in stacks
    assert "in stand_still" in stacks
    assert RankReport.read(tmp_path / "hang" / "rank_00000.txt") is not None


def test_a_rank_without_room_for_another_thread_is_ended(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        Watchdog(tmp_path, 0, 0.05, Heartbeat()).start()
        threading.stack_size(2**46)  # more than a process may have: no thread starts any more
        signal.alarm(20)  # fails the test instead of leaving it waiting
        threading.Event().wait()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == EXIT_CODE


def test_zero_ends_nothing(tmp_path: Path) -> None:
    assert stand_still(tmp_path, 0.0, Heartbeat()) == -signal.SIGKILL
    assert not (tmp_path / "hang").exists()


def test_what_is_slow_by_nature_is_given_more_time() -> None:
    heartbeat = Heartbeat()
    timers = Timers(heartbeat)
    with timers.section("forward_backward"):
        assert heartbeat.place.is_slow  # the first step
    heartbeat.finish_step(1)
    with timers.section("forward_backward"):
        assert not heartbeat.place.is_slow
    with timers.section("evaluate"):
        before = heartbeat.place
        assert before.is_slow
        heartbeat.advance()
        assert (heartbeat.place.phase, heartbeat.place.mark) == ("evaluate", before.mark + 1)
    assert not heartbeat.place.is_slow


def report(rank: int, mark: int, phase: str = "wait") -> RankReport:
    return RankReport(1, rank, f"node{rank}", 100 + rank, 7, phase, mark, 300.0)


BEHIND = {0: report(0, 50), 1: report(1, 49, "data"), 2: report(2, 50)}


@pytest.mark.parametrize(
    "reports, expected",
    [
        (
            {0: BEHIND[0], 1: BEHIND[1]},
            "no progress for 300 s after step 7; suspect is what does not answer, being stopped, dead or cut off:\n"
            "  rank 2 (node2, pid 102) in step 8, wait",
        ),
        (
            BEHIND,
            "no progress for 300 s after step 7; suspect is what is behind the others (they are in step 8, wait):\n"
            "  rank 1 (node1, pid 101) in step 8, data",
        ),
        (
            {rank: report(rank, 50) for rank in range(3)},
            "no progress for 300 s after step 7; all 3 ranks answer, and are at the same place: wait; see their stacks",
        ),
    ],
    ids=["silent", "behind", "together"],
)
def test_the_suspects_are_named(reports: dict[int, RankReport], expected: str) -> None:
    assert verdict(reports, BEHIND) == expected


def test_of_many_suspects_some_are_named() -> None:
    beats: dict[int, RankReport | None] = dict.fromkeys(range(64))
    message = verdict({5: report(5, 50)}, beats)
    assert "\n  rank 0 (never heard of)\n" in message
    assert message.endswith("\n  and 55 more")


@pytest.mark.parametrize("content", ["", "{", "{}", '{"rank": 1}', "[]"])
def test_a_file_that_is_not_whole_says_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / "beat").write_text(content)
    assert RankReport.read(tmp_path / "beat") is None
