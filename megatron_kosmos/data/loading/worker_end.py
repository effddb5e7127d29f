"""The end of worker processes with the process that they work for, however that ends, and not before."""

import ctypes
import os
import signal
import sys
from threading import Thread

PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int, worker: int) -> None:
    """Let the kernel kill this process, a child of `parent`, when its parent is gone, and no signal that asks a run to
    stop before that: launchers send it to all processes, and the parent needs its data until it has saved.

    torch looks for the parent itself, every five seconds and only between batches; until then memory, locks and ports
    that a restarted run wants would be held. Elsewhere than on Linux that is all there is.
    """
    if sys.platform != "linux":
        return
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # The parent may say so with SIGTERM, as torch does to a worker that is late; nobody else.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    Thread(target=_end_when_told, args=(parent,), name="end", daemon=True).start()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before the kernel knew
        os._exit(1)


def _end_when_told(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
