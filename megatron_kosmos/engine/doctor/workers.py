"""The processes of a node, one a GPU as in training: each looks at its device, then takes part in the collectives.

They are forked before the node does anything else, from a parent that has torch loaded and hasn't touched CUDA: they
share its memory, and a GPU that never answers holds up its own process only.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection, wait

import torch
import torch.distributed as dist

from megatron_kosmos.engine.doctor.all_reduce import ON_CPU, ON_GPU, try_collectives
from megatron_kosmos.engine.doctor.facts import DeviceFacts, SumFacts, Wire
from megatron_kosmos.model.kernels import obstacles_on

_DEVICE, _SUM = Wire(DeviceFacts), Wire(SumFacts)
_STOP_SECONDS = 2.0


@dataclass(frozen=True)
class Gathering:
    """What the ranks need to meet: the address of the first node's store, and their number."""

    address: str
    port: int
    first_rank: int
    """Of this node."""
    world_size: int
    neighbour_distance: int
    timeout_seconds: float
    """For each collective, and for all to come."""


class Workers:
    """A node's processes. Leave the block, and they are ended."""

    def __init__(self, num_workers: int, on_cpu: bool) -> None:
        context, parent = multiprocessing.get_context("fork"), os.getpid()
        self._connections, self._processes = list[Connection](), []
        for local_rank in range(num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, parent, local_rank, on_cpu), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for end in ("terminate", "kill"):
            for process in self._processes:
                getattr(process, end)()
            deadline = time.monotonic() + _STOP_SECONDS
            for process in self._processes:
                process.join(max(0.0, deadline - time.monotonic()))

    @property
    def process_ids(self) -> list[int]:
        """Of the processes, by local rank."""
        return [process.pid or 0 for process in self._processes]

    def devices(self, timeout_seconds: float) -> tuple[DeviceFacts, ...]:
        """Return what each found, by local rank."""
        answers = self._collect(timeout_seconds)
        return tuple(
            _DEVICE.read(answer.text) if answer.text else DeviceFacts(error=answer.fault) for answer in answers
        )

    def sums(self, gathering: Gathering) -> tuple[SumFacts, ...]:
        """Let them meet the other nodes' processes, and return what each found, by local rank."""
        for local_rank, connection in enumerate(self._connections):
            order = {**vars(gathering), "first_rank": gathering.first_rank + local_rank}
            try:
                connection.send_bytes(json.dumps(order).encode())
            except OSError:
                continue  # it has ended, which is told below
        # Twice: for all to come, and for a collective that ends by its own timeout to say so.
        answers = self._collect(2 * gathering.timeout_seconds)
        return tuple(
            replace(_SUM.read(answer.text), stage=answer.stage)
            if answer.text
            else SumFacts(error=answer.fault, is_silent=True, stage=answer.stage)
            for answer in answers
        )

    def _collect(self, timeout_seconds: float) -> list["_Answer"]:
        """Wait for an answer of each, or its end, or the timeout."""
        answers = [_Answer() for _ in self._connections]
        open_ranks = {connection: local_rank for local_rank, connection in enumerate(self._connections)}
        deadline = time.monotonic() + timeout_seconds
        while open_ranks and (left := deadline - time.monotonic()) > 0:
            for connection in wait([*open_ranks], timeout=left):
                assert isinstance(connection, Connection)
                answer = answers[open_ranks[connection]]
                if not answer.take(connection, self._processes[open_ranks[connection]]):
                    del open_ranks[connection]
        for local_rank in open_ranks.values():
            answers[local_rank].fault = f"no answer within {timeout_seconds:g} s"
        return answers


class _Answer:
    """What one process has said so far."""

    def __init__(self) -> None:
        self.text, self.stage, self.fault = "", "starting", ""

    def take(self, connection: Connection, process: multiprocessing.process.BaseProcess) -> bool:
        """Take the next message, and return whether more will follow."""
        try:
            message = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            process.join(_STOP_SECONDS)
            self.fault = f"the process ended by itself (exit code {process.exitcode})"
            return False
        if "stage" in message:
            self.stage = message["stage"]
            return True
        self.text = message["facts"]
        return False


def _serve(connection: Connection, parent: int, local_rank: int, on_cpu: bool) -> None:
    """Be one of the processes."""
    torch.set_num_threads(1)
    device = torch.device("cpu") if on_cpu else torch.device("cuda", local_rank)

    def answer(facts: str) -> None:
        connection.send_bytes(json.dumps({"facts": facts}).encode())

    answer(_DEVICE.write(_look_at(device, with_kernels=local_rank == 0)))
    while not connection.poll(1.0):
        if os.getppid() != parent:
            return
    order = Gathering(**json.loads(connection.recv_bytes()))
    answer(_SUM.write(_take_part(order, device, lambda stage: connection.send_bytes(_stage(stage)))))


def _stage(name: str) -> bytes:
    return json.dumps({"stage": name}).encode()


def _look_at(device: torch.device, with_kernels: bool) -> DeviceFacts:
    """Return what can be said of `device`, which is used for the first time here."""
    try:
        obstacles = tuple(int(one) for one in obstacles_on(device).values()) if with_kernels else ()
        if device.type == "cpu":
            return DeviceFacts(obstacles=obstacles)
        torch.ones(8, device=device).sum().item()
        free, total = torch.cuda.mem_get_info(device)
        return DeviceFacts(torch.cuda.get_device_name(device), total, free, obstacles=obstacles)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        return DeviceFacts(error=_first_line(error))


def _take_part(order: Gathering, device: torch.device, say: Callable[[str], None]) -> SumFacts:
    """Join the other ranks and try the collectives. Default process group of all ranks of all nodes."""
    timeout = timedelta(seconds=order.timeout_seconds)
    try:
        say("meeting the other ranks")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store = dist.TCPStore(order.address, order.port, is_master=False, timeout=timeout, wait_for_workers=False)
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "nccl",
            store=dist.PrefixStore("doctor-collectives", store),
            rank=order.first_rank,
            world_size=order.world_size,
            timeout=timeout,
        )
        facts = try_collectives(ON_CPU if device.type == "cpu" else ON_GPU, device, order.neighbour_distance, say)
        say("leaving")
        dist.barrier()
        dist.destroy_process_group()
        return facts
    except RuntimeError as error:  # of torch's: a timeout, a peer that went away, a library that fails
        return SumFacts(error=_first_line(error))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
