"""What a node tells of itself: plain values, sent as JSON."""

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from pydantic import TypeAdapter

Told = TypeVar("Told")


@dataclass(frozen=True)
class DeviceFacts:
    """What one process, which has one GPU or works on the CPU, found."""

    name: str = "cpu"
    total_bytes: int = 0
    free_bytes: int = 0
    error: str = ""
    """Why it can't be used; empty where it can."""
    obstacles: tuple[int, ...] = ()
    """`model.kernels.Obstacle` of each of its LIBRARIES, in their order; told by a node's first process only."""


@dataclass(frozen=True)
class FolderFacts:
    """What a node found where the run is written."""

    free_bytes: int = 0
    held_bytes: int = 0
    """Of the checkpoints that are there already, for a run that goes on."""
    token: str = ""
    """Name of the file that this node left there for the others."""
    error: str = ""


@dataclass(frozen=True)
class NodeFacts:
    """What a node found on its own."""

    node: int
    name: str
    versions: dict[str, str] = field(default_factory=dict)
    unfit: tuple[str, ...] = ()
    """Packages that are absent or outside the versions that this one needs, with the needed ones."""
    devices: tuple[DeviceFacts, ...] = ()
    """By local rank."""
    num_gpus: int = 0
    """That torch sees, whatever number was asked for."""
    available_memory: int = 0
    """Bytes of host memory that the node, or the job's part of it, has left."""
    shared_memory: int = 0
    """Free bytes of /dev/shm."""
    folder: FolderFacts = FolderFacts()
    refusal: str = ""
    """Why the run of --config can't start here: settings, tokenizer, corpora; empty where it can."""


@dataclass(frozen=True)
class SumFacts:
    """What one rank found in the collectives."""

    num_bytes: tuple[int, ...] = ()
    """Of the all-reduces."""
    seconds: tuple[float, ...] = ()
    """Median time of each."""
    wrong_sums: int = 0
    """Of those sizes, how many had another sum than they must."""
    wrong_senders: tuple[int, ...] = ()
    """Ranks whose data arrive here as other data than they must send."""
    work_seconds: float = 0.0
    """Its own multiplication of matrices, best of several."""
    link_seconds: float = 0.0
    """Receiving from `sender` while all do the same, best of several."""
    link_bytes: int = 0
    sender: int = 0
    error: str = ""
    is_silent: bool = False
    """Whether it didn't even say that it failed: it hangs, or its process is gone."""
    stage: str = ""
    """How far it came, where it didn't finish."""


class Wire(Generic[Told]):
    """JSON of one kind of facts, checked when it is read."""

    def __init__(self, kind: type[Told]) -> None:
        self._adapter = TypeAdapter(kind)

    def write(self, told: Told) -> str:
        """Return the JSON of `told`."""
        return self._adapter.dump_json(told).decode()

    def read(self, text: str) -> Told:
        """Return what `text` tells. Raises pydantic's ValidationError for other JSON."""
        return self._adapter.validate_json(text)
