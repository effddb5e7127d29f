"""What the facts of all nodes amount to: pure functions from facts to checks, each naming the nodes that stand out."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.filesize import decimal

from megatron_kosmos.config import ConfigError, RunConfig
from megatron_kosmos.engine.doctor.checks import Check, Status, first_of
from megatron_kosmos.engine.doctor.facts import NodeFacts
from megatron_kosmos.engine.doctor.meeting import ClockOffset
from megatron_kosmos.model.kernels import LIBRARIES, Obstacle, resolve, why_missing

_GB = 10**9
_LEAST_DISK, _LITTLE_DISK = _GB, 20 * _GB
_LITTLE_MEMORY = _GB
"""Of the host, for each process: what its libraries take."""
_LITTLE_SHARED_MEMORY = _GB
_CLOCK_WARN, _CLOCK_BAD = 1.0, 30.0
_ACTIVATIONS = 0.8
"""Part of a GPU's memory above which the known rest leaves little for activations."""


_DRIVER = "driver"
"""Clusters renew it node by node, and versions of it work together."""


@dataclass(frozen=True)
class Needs:
    """What the run of --config takes, in bytes."""

    disk: int
    """For the newest checkpoints."""
    disk_at_end: int
    """With those that are kept for good, too."""
    gpu: int
    """On the fullest rank, without activations."""
    host: int
    """For each process, beside what its libraries take."""


def judge_versions(nodes: Sequence[NodeFacts]) -> list[Check]:
    """Are the libraries there, in the needed versions, and the same everywhere?"""
    checks = []
    for unfit in sorted({one for node in nodes for one in node.unfit}):
        where = _names(node for node in nodes if unfit in node.unfit)
        remedy = "make install on that node, or the same image everywhere (docs/versions.md)"
        checks.append(Check("versions", Status.BAD, f"{where}: {unfit}", remedy))
    packages = list(dict.fromkeys(package for node in nodes for package in node.versions))
    for package in packages:
        by_version: dict[str, list[NodeFacts]] = {}
        for node in nodes:
            by_version.setdefault(node.versions.get(package, "absent"), []).append(node)
        if len(by_version) > 1:
            groups = sorted(by_version.items(), key=lambda item: -len(item[1]))
            found = "; ".join(f"{version} on {_names(holders)}" for version, holders in groups)
            remedy = "give every node the same environment: one folder that all see, or one container image"
            status = Status.WARN if package == _DRIVER else Status.BAD
            checks.append(Check("versions", status, f"{package} differs: {found}", remedy))
    if not checks:
        shown = ("python", "torch", "cuda", "nccl", "driver", "megatron-core", "deepspeed", "transformers", "code")
        versions = nodes[0].versions
        found = ", ".join(f"{name} {versions[name]}" for name in shown if name in versions)
        checks.append(Check("versions", Status.GOOD, found + _everywhere(nodes)))
    return checks


def judge_devices(nodes: Sequence[NodeFacts], on_cpu: bool) -> list[Check]:
    """Are all GPUs there, do they work, and are they alike and free?"""
    broken = [
        Check("GPUs", Status.BAD, f"{node.name}, local rank {number}: {device.error}", _BROKEN_GPU)
        for node in nodes
        for number, device in enumerate(node.devices)
        if device.error
    ]
    if broken:
        return broken
    if on_cpu:
        return [Check("GPUs", Status.GOOD, f"none is used: {len(nodes[0].devices)} processes on the CPU")]
    checks = []
    few = [node for node in nodes if node.num_gpus < len(node.devices)]
    for node in few:
        checks.append(Check("GPUs", Status.BAD, f"{node.name} has {node.num_gpus}", _FEW_GPUS))
    kinds = Counter(device.name for node in nodes for device in node.devices)
    if len(kinds) > 1:
        found = "; ".join(
            f"{kind} on {_names(node for node in nodes if any(one.name == kind for one in node.devices))}"
            for kind in kinds
        )
        checks.append(
            Check("GPUs", Status.WARN, found, "the slowest kind sets the pace: ask for one kind (--constraint)")
        )
    used = [
        f"{node.name}, GPU {number}: {decimal(device.free_bytes)} free of {decimal(device.total_bytes)}"
        for node in nodes
        for number, device in enumerate(node.devices)
        if device.free_bytes < 0.9 * device.total_bytes
    ]
    if used:
        remedy = "another process uses it: nvidia-smi there; ask for whole nodes (--exclusive)"
        checks.append(Check("GPUs", Status.WARN, "; ".join(used), remedy))
    if not checks:
        device = nodes[0].devices[0]
        found = f"{len(nodes[0].devices)} {device.name}, {decimal(device.total_bytes)} each"
        checks.append(Check("GPUs", Status.GOOD, found + _everywhere(nodes)))
    return checks


_BROKEN_GPU = "nvidia-smi there; drain the node or leave it out (sbatch --exclude=NODE)"
_FEW_GPUS = "ask for them (--gpus-per-node), set --gpus to what there is, or leave the node out (sbatch --exclude=NODE)"


def judge_kernels(nodes: Sequence[NodeFacts], run: RunConfig | None) -> list[Check]:
    """Tell which kernels the job will compute with, and how to get the rest.

    What one node lacks none uses; a kernel that the settings name must be on all.
    """
    by_node = {node.name: [Obstacle(one) for one in node.devices[0].obstacles] for node in nodes if node.devices}
    if not by_node or not all(by_node.values()):
        return []  # a device that can't be used is told elsewhere
    worst = dict(zip(LIBRARIES, (max(column) for column in zip(*by_node.values(), strict=True)), strict=True))
    checks = []
    if run is not None:
        try:
            checks.append(Check("kernels", Status.GOOD, f"in use: {resolve(run, worst)}"))
        except ConfigError as error:
            return [Check("kernels", Status.BAD, str(error), "install it on every node, or set it to auto")]
    if all(obstacle == Obstacle.NO_CUDA for obstacle in worst.values()):
        found = "torch's own: the faster ones (flash-attn, TransformerEngine, apex) need an NVIDIA GPU"
        return [*checks, Check("kernels", Status.GOOD, found)] if run is None else checks
    for number, (choice, obstacle) in enumerate(worst.items()):
        key, value = choice
        if obstacle == Obstacle.NONE:
            checks.append(Check("kernels", Status.GOOD, f"kernels.{key}={value} can be used"))
            continue
        lacking = [name for name, obstacles in by_node.items() if obstacles[number] != Obstacle.NONE]
        where = "" if len(lacking) == len(by_node) else f" on {first_of(lacking)} only: none will use it"
        remedy = why_missing(choice, worst) or ""
        checks.append(Check("kernels", Status.WARN, f"kernels.{key}={value} is not there{where}", remedy))
    return checks


def judge_memory(nodes: Sequence[NodeFacts], needs: Needs | None) -> list[Check]:
    """Is there memory on the GPUs and on the host?"""

    def host_need(node: NodeFacts) -> int:
        return len(node.devices) * (_LITTLE_MEMORY + (needs.host if needs else 0))

    checks = [
        _each(
            "host memory",
            nodes,
            lambda node: Status.WARN if node.available_memory < host_need(node) else Status.GOOD,
            lambda node: f"{decimal(node.available_memory)} free for {len(node.devices)} processes",
            f"about {decimal(max(map(host_need, nodes)))} are needed: ask for the node's whole memory (--mem=0)",
        ),
        _each(
            "/dev/shm",
            nodes,
            lambda node: Status.WARN if node.shared_memory < _LITTLE_SHARED_MEMORY else Status.GOOD,
            lambda node: f"{decimal(node.shared_memory)} free",
            "data loaders and NCCL pass data there: give a container more (docker --shm-size=16g --ipc=host)",
        ),
    ]
    if needs and any(device.total_bytes for node in nodes for device in node.devices):

        def room(node: NodeFacts) -> int:
            return min(device.total_bytes for device in node.devices)

        def status(node: NodeFacts) -> Status:
            if needs.gpu > room(node):
                return Status.BAD
            return Status.WARN if needs.gpu > _ACTIVATIONS * room(node) else Status.GOOD

        remedy = "more tensor or pipeline ranks, a higher parallel.zero_stage, or optimizer.kind=adamw_8bit"
        found = f"the fullest rank takes {decimal(needs.gpu)} before activations"
        checks.append(_each("GPU memory", nodes, status, lambda node: f"{found}; {decimal(room(node))} there", remedy))
    return checks


def judge_folder(nodes: Sequence[NodeFacts], unseen: Mapping[int, Sequence[int]], needs: Needs | None) -> list[Check]:
    """Can every node write the run's folder, is it one folder, and does the run fit?

    `unseen` has, by node, those whose tokens don't show up on it.
    """
    need, wanted = (needs.disk, needs.disk_at_end) if needs else (_LEAST_DISK, _LITTLE_DISK)
    names = {node.node: node.name for node in nodes}
    checks = [
        Check("run folder", Status.BAD, f"{node.name}: {node.folder.error}", "mount it there, and let this user write")
        for node in nodes
        if node.folder.error
    ]
    blind = {seer: hidden for seer, hidden in unseen.items() if hidden}
    if blind and not checks:
        found = "; ".join(f"{names[seer]} doesn't see {first_of(names[one] for one in blind[seer])}" for seer in blind)
        odd = Counter(one for seer, hidden in blind.items() for one in (seer, *hidden)).most_common()
        apart = first_of(names[node] for node, count in odd if count == odd[0][1])
        remedy = (
            f"look at {apart}: the folder must be on a file system that every node mounts, not on a node's own disk"
        )
        checks.append(Check("shared folder", Status.BAD, found, remedy))
    elif len(nodes) > 1 and not checks:
        checks.append(Check("shared folder", Status.GOOD, f"each of {len(nodes)} nodes sees what the others write"))
    reason = (
        f"{decimal(need)} are needed for the checkpoints of checkpoint.keep_last and one more, {decimal(wanted)} are "
        f"needed until the end, with those of keep_every"
    )

    def status(node: NodeFacts) -> Status:
        room = node.folder.free_bytes + (node.folder.held_bytes if needs else 0)
        if room < need:
            return Status.BAD
        return Status.WARN if room < wanted else Status.GOOD

    def tell(node: NodeFacts) -> str:
        held = f", {decimal(node.folder.held_bytes)} in checkpoints" if node.folder.held_bytes else ""
        return f"{decimal(node.folder.free_bytes)} free{held}"

    if not any(node.folder.error for node in nodes):
        remedy = f"{reason}; free space or set another run_dir" if needs else "free space, or set another run_dir"
        checks.append(_each("disk", nodes, status, tell, remedy))
    return checks


def judge_clocks(names: Mapping[int, str], offsets: Mapping[int, ClockOffset]) -> list[Check]:
    """Do the nodes' clocks agree with the first one's? What the measurement itself took is left out of account."""
    sure = {node: max(0.0, abs(offset.seconds) - offset.uncertainty) for node, offset in offsets.items()}
    checks = [
        Check(
            "clocks",
            Status.BAD if sure[node] >= _CLOCK_BAD else Status.WARN,
            f"{names[node]} is {abs(offsets[node].seconds):.1f} s {'ahead' if offsets[node].seconds > 0 else 'behind'}",
            "set it and let it be kept: chronyc tracking, systemctl restart chronyd",
        )
        for node in sorted(sure)
        if sure[node] >= _CLOCK_WARN
    ]
    if offsets and not checks:
        worst = max(offsets.values(), key=lambda offset: abs(offset.seconds) + offset.uncertainty)
        found = f"within {abs(worst.seconds) + worst.uncertainty:.3f} s of {names[0]}"
        checks.append(Check("clocks", Status.GOOD, found))
    return checks


def judge_run(nodes: Sequence[NodeFacts]) -> list[Check]:
    """Do settings, tokenizer and corpora let the run start on every node?"""
    by_refusal: dict[str, list[NodeFacts]] = {}
    for node in nodes:
        by_refusal.setdefault(node.refusal, []).append(node)
    return [
        Check("run", Status.BAD, f"{_names(refused)}: {refusal}", "mend it; training would stop on the same")
        if refusal
        else Check("run", Status.GOOD, f"settings, tokenizer and corpora fit{_everywhere(refused)}")
        for refusal, refused in by_refusal.items()
    ]


def _each(
    subject: str,
    nodes: Sequence[NodeFacts],
    status_of: Callable[[NodeFacts], Status],
    tell: Callable[[NodeFacts], str],
    remedy: str,
) -> Check:
    """Return one check for all nodes: the worst of them by name, or what all have at least."""
    status = max(map(status_of, nodes))
    if status == Status.GOOD:
        told = list(dict.fromkeys(map(tell, nodes)))
        return Check(subject, status, told[0] + (f" on {nodes[0].name}, the rest has enough too" if told[1:] else ""))
    worst = [node for node in nodes if status_of(node) == status]
    return Check(subject, status, "; ".join(f"{node.name}: {tell(node)}" for node in worst), remedy)


def _names(nodes: Iterable[NodeFacts]) -> str:
    return first_of(node.name for node in nodes)


def _everywhere(nodes: Sequence[NodeFacts]) -> str:
    return f", the same on {len(nodes)} nodes" if len(nodes) > 1 else ""
