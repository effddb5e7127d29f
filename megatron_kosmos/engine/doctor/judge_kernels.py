"""Which kernels a job will compute with, given what every node's libraries and GPUs allow, and how to get the rest."""

from collections.abc import Sequence

from megatron_kosmos.config import ConfigError, RunConfig
from megatron_kosmos.engine.doctor.checks import Check, Status
from megatron_kosmos.engine.doctor.facts import NodeFacts
from megatron_kosmos.model.kernels import LIBRARIES, Obstacle, resolve, why_missing

_SUBJECT = "kernels"


def judge_kernels(nodes: Sequence[NodeFacts], run: RunConfig | None) -> list[Check]:
    """Tell what is used. What one node lacks none uses; a kernel that the settings name must be on all."""
    by_node = {node.name: [Obstacle(one) for one in node.devices[0].obstacles] for node in nodes if node.devices}
    if not by_node or not all(by_node.values()):
        return []  # a device that can't be used is told elsewhere
    worst = dict(zip(LIBRARIES, (max(column) for column in zip(*by_node.values(), strict=True)), strict=True))
    checks = []
    if run is not None:
        try:
            checks.append(Check(_SUBJECT, Status.GOOD, f"in use: {resolve(run, worst)}"))
        except ConfigError as error:
            return [Check(_SUBJECT, Status.BAD, str(error), "install it on every node, or set it to auto")]
    if all(obstacle == Obstacle.NO_CUDA for obstacle in worst.values()):
        found = "torch's own: the faster ones (flash-attn, TransformerEngine, apex) need an NVIDIA GPU"
        return [*checks, Check(_SUBJECT, Status.GOOD, found)] if run is None else checks
    for number, (choice, obstacle) in enumerate(worst.items()):
        key, value = choice
        if obstacle == Obstacle.NONE:
            checks.append(Check(_SUBJECT, Status.GOOD, f"kernels.{key}={value} can be used"))
            continue
        lacking = [name for name, obstacles in by_node.items() if obstacles[number] != Obstacle.NONE]
        where = "" if len(lacking) == len(by_node) else f" on {', '.join(lacking[:8])} only: none will use it"
        remedy = why_missing(choice, worst) or ""
        checks.append(Check(_SUBJECT, Status.WARN, f"kernels.{key}={value} is not there{where}", remedy))
    return checks
