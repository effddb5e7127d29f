"""Real process groups for tests: ranks are forked from a parent that has everything imported.

Forking four ranks takes a quarter of a second; spawning them, with their imports, twenty.
"""

import faulthandler
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_kosmos.parallel.topology import start_process_group, stop_process_group


class RankFailure(AssertionError):
    """A rank raised, died or hung; the message has every rank's traceback or stack."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: int = 120) -> list[Any]:
    """Call `function(*args)` in `world_size` forked processes that share a gloo process group.

    Returns their results by rank. A rank that fails or outlives the timeout ends all of them and raises RankFailure;
    hung ranks leave their Python stacks in the message.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        children = [_fork_rank(function, rank, world_size, port, args, Path(folder)) for rank in range(world_size)]
        failed = _wait(children, timeout_seconds)
        if failed:
            raise RankFailure("\n".join(_report(Path(folder), rank) for rank in range(world_size)))
        # Our own children's results, from a folder that only this process and they could write to.
        return [pickle.loads(_result_file(Path(folder), rank).read_bytes()) for rank in range(world_size)]


def _fork_rank(
    function: Callable[..., Any], rank: int, world_size: int, port: int, args: tuple[Any, ...], folder: Path
) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        stacks = open(folder / f"rank{rank}.stacks", "w")  # noqa: SIM115 (faulthandler needs it open until exit)
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size))
        os.environ.update(LOCAL_RANK=str(rank), LOCAL_SIZE=str(world_size))
        torch.set_num_threads(1)
        start_process_group(rank, world_size, local_rank=rank, timeout_seconds=60)
        result = function(*args)
        _result_file(folder, rank).write_bytes(pickle.dumps(result))
        torch.distributed.barrier()
        stop_process_group()
        code = 0
    except BaseException:
        (folder / f"rank{rank}.error").write_text(traceback.format_exc())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(children: list[int], timeout_seconds: int) -> bool:
    """Reap the children; when one fails or time runs out, ask the rest for their stacks and end them."""
    deadline = time.monotonic() + timeout_seconds
    alive, failed = set(children), False
    while alive and not failed and time.monotonic() < deadline:
        for child in list(alive):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                alive.discard(child)
                failed = failed or status != 0
        time.sleep(0.01)
    failed = failed or bool(alive)
    for signal_number, pause in ((signal.SIGUSR1, 0.3), (signal.SIGKILL, 0.0)):
        for child in alive:
            os.kill(child, signal_number)
        time.sleep(pause if alive else 0)
    for child in alive:
        os.waitpid(child, 0)
    return failed


def _report(folder: Path, rank: int) -> str:
    error, stacks = folder / f"rank{rank}.error", folder / f"rank{rank}.stacks"
    if error.exists():
        return f"--- rank {rank} raised\n{error.read_text()}"
    if stacks.exists() and stacks.stat().st_size:
        return f"--- rank {rank} was still running\n{stacks.read_text()}"
    return f"--- rank {rank} {'ended' if _result_file(folder, rank).exists() else 'died'}"


def _result_file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.result"


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
