"""The end of worker processes with the process that they work for, however that ends."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int, worker: int) -> None:
    """Let the kernel kill this process, a child of `parent`, when its parent is gone.

    torch looks for that itself, every five seconds and only between batches; until then memory, locks and ports that a
    restarted run wants would be held. Elsewhere than on Linux that is all there is.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before the kernel knew
        os._exit(1)
