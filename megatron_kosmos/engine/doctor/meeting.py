"""Where the nodes of a job meet: a store on the first node, through which each tells the others what it found.

Every wait ends by a timeout, and says whom it waited for.
"""

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from megatron_kosmos.engine.doctor.deadline import within

RESOLVE_SECONDS = 5.0
"""For a name server to say where the first node is; training would wait minutes for it."""
_CLOCK_ROUNDS = 3


class NoMeetingError(Exception):
    """This node can't meet the others; the message says why and what to do."""


@dataclass(frozen=True)
class Place:
    """This node among those of the job."""

    node: int
    num_nodes: int
    name: str
    """What this node is called."""
    head: str
    """Name or address of node 0."""
    port: int
    """Of its store; 0 takes a free one, for a node that is alone."""
    names: tuple[str, ...] = ()
    """Of all nodes, where they are known beforehand."""

    def name_of(self, node: int) -> str:
        """Return what people call `node`."""
        return self.names[node] if node < len(self.names) else f"node {node}"


@dataclass(frozen=True)
class ClockOffset:
    """How far a node's clock is before the first node's, in seconds."""

    seconds: float
    uncertainty: float
    """Half of the time that asking took."""


class Meeting:
    """This node's end of the store."""

    def __init__(self, place: Place, timeout_seconds: float) -> None:
        """Open the store on node 0, find it on the others. Raises NoMeetingError."""
        self.address = _resolve(place.head)
        is_head = place.node == 0
        if not is_head:
            _wait_for_listener(self.address, place, timeout_seconds)
        try:
            self._store = dist.TCPStore(
                self.address,
                place.port,
                is_master=is_head,
                timeout=timedelta(seconds=timeout_seconds),
                wait_for_workers=False,
            )
        except RuntimeError as error:  # torch.distributed.DistError
            raise NoMeetingError(_no_store(place, self.address, str(error).splitlines()[0])) from error
        self.port = self._store.port

    def tell(self, key: str, text: str) -> None:
        """Leave `text` for whoever reads `key`. Raises NoMeetingError where the first node has gone."""
        try:
            self._store.set(key, text)
        except RuntimeError as error:
            raise NoMeetingError(_GONE) from error

    def read(self, key: str, timeout_seconds: float) -> str | None:
        """Return what is told under `key`, or None if nothing is by then. Raises NoMeetingError as `tell`."""
        try:
            self._store.wait([key], timedelta(seconds=max(0.001, timeout_seconds)))
            return self._store.get(key).decode()
        except dist.DistStoreError:
            return None
        except RuntimeError as error:
            raise NoMeetingError(_GONE) from error

    def read_all(self, key: str, nodes: Sequence[int], timeout_seconds: float) -> dict[int, str]:
        """Return what `nodes` told under `key`, without those that hadn't when the time was over."""
        deadline = time.monotonic() + timeout_seconds
        told = {node: self.read(f"{key}/{node}", deadline - time.monotonic()) for node in nodes}
        return {node: text for node, text in told.items() if text is not None}

    def read_clock(self, node: int, timeout_seconds: float) -> ClockOffset | None:
        """Ask `node`, which calls `answer_clock`, for its time; None where it doesn't answer."""
        best: ClockOffset | None = None
        for number in range(_CLOCK_ROUNDS):
            start = time.time()
            self.tell(f"clock-asked/{node}/{number}", "")
            told = self.read(f"clock/{node}/{number}", timeout_seconds)
            half = (time.time() - start) / 2
            if told is None:
                return None
            if best is None or half < best.uncertainty:
                best = ClockOffset(float(told) - (start + half), half)
        return best

    def answer_clock(self, node: int, timeout_seconds: float) -> None:
        """Tell the first node this one's time, as often as it asks."""
        for number in range(_CLOCK_ROUNDS):
            if self.read(f"clock-asked/{node}/{number}", timeout_seconds) is None:
                raise NoMeetingError(_GONE)
            self.tell(f"clock/{node}/{number}", repr(time.time()))


_GONE = "the first node's doctor has ended or doesn't answer; what it printed says why"


def _no_store(place: Place, address: str, reason: str) -> str:
    """Return what to do about a store that doesn't open, or doesn't answer as one."""
    where = f"{place.head} ({address}), port {place.port}"
    if place.node == 0:
        return (
            f"{where} can't be opened: {reason}. --head (MASTER_ADDR) must be a name or address of this node, node 0, "
            "and no other process may have the port: set another --port (MASTER_PORT)"
        )
    return f"{where} answers, but not as node 0's doctor: {reason}. Set another --port (MASTER_PORT)"


def _resolve(head: str) -> str:
    """Return the address of `head`."""
    try:
        found = within(RESOLVE_SECONDS, socket.getaddrinfo, head, None, 0, socket.SOCK_STREAM)
    except (OSError, TimeoutError, UnicodeError) as error:
        raise NoMeetingError(
            f"the name of the first node, {head!r}, can't be resolved here ({error}). Set MASTER_ADDR (--head) to a "
            "name that every node knows, or to an address: getent hosts NAME must print one on each node"
        ) from error
    return str(found[0][4][0])


def _wait_for_listener(address: str, place: Place, timeout_seconds: float) -> None:
    """Wait until something listens on the first node's port."""
    deadline, reason = time.monotonic() + timeout_seconds, "no time was left"
    while (left := deadline - time.monotonic()) > 0:
        try:
            socket.create_connection((address, place.port), timeout=min(left, 5.0)).close()
            return
        except OSError as error:
            reason = str(error)
        time.sleep(min(0.2, max(0.0, deadline - time.monotonic())))
    raise NoMeetingError(
        f"nothing answers at {place.head} ({address}), port {place.port}, within {timeout_seconds:g} s: {reason}. Is "
        f"{place.name_of(0)} node 0, does the doctor run there, and may the nodes reach each other (firewall, network)?"
    )
