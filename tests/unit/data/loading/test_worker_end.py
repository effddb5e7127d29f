"""Worker processes: they outlive what asks a run to stop, until their parent says otherwise."""

import os
import signal
from multiprocessing import get_context
from multiprocessing.connection import Connection

import pytest

from megatron_kosmos.data.loading.worker_end import end_with_parent


def work(parent: int, connection: Connection) -> None:
    """Answer until the process is ended."""
    end_with_parent(parent, 0)
    while True:
        connection.send(os.getpid())
        connection.recv()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_worker_outlives_signals_of_others_but_not_its_parents(number: signal.Signals) -> None:
    # Fresh processes: a library that starts threads in a forked one would have them take what the worker holds back.
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    worker = context.Process(target=work, args=(os.getpid(), theirs), daemon=True)
    worker.start()
    assert worker.pid is not None
    assert ours.recv() == worker.pid
    sender = context.Process(target=os.kill, args=(worker.pid, number))
    sender.start()
    sender.join()
    for _ in range(3):
        ours.send("go on")
        assert ours.recv() == worker.pid
    worker.terminate()
    worker.join()
    assert worker.exitcode == 0
