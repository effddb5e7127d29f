"""The part of the first node: it gathers what all found, judges it, and names the nodes that are missing or bad."""

import json
import time
from dataclasses import asdict

from pydantic import ValidationError

from megatron_kosmos.config import ConfigError
from megatron_kosmos.engine.doctor.checks import Check, Status, is_good
from megatron_kosmos.engine.doctor.deadline import within
from megatron_kosmos.engine.doctor.facts import NodeFacts, SumFacts
from megatron_kosmos.engine.doctor.follow import GOOD, unseen
from megatron_kosmos.engine.doctor.judge_nodes import (
    Needs,
    judge_clocks,
    judge_devices,
    judge_folder,
    judge_kernels,
    judge_memory,
    judge_run,
    judge_versions,
)
from megatron_kosmos.engine.doctor.judge_sums import judge_sums
from megatron_kosmos.engine.doctor.patient import NODE, SUMS, Findings, Patient
from megatron_kosmos.engine.doctor.workers import Gathering

_BYE_SECONDS = 5.0
_WAYS_TO_FAIL = "the node is down, srun didn't reach it, or it can't reach this one; what it printed says more"


def lead(patient: Patient) -> Findings:
    """Examine the job, and return every check. Each wait for another node ends by the timeout."""
    wanted, meeting = patient.wanted, patient.meeting
    needs, checks = _needs(patient)
    nodes, unheard = _gather_facts(patient)
    checks += unheard
    checks += judge_versions(nodes) + judge_devices(nodes, wanted.on_cpu) + judge_kernels(nodes, wanted.run)
    checks += judge_memory(nodes, needs) + _judge_together(patient, nodes, needs)
    if wanted.run is not None or any(node.refusal for node in nodes):
        checks += judge_run(nodes)
    checks += _judge_sums(patient, nodes, may_try=is_good(checks))
    meeting.tell("verdict", GOOD if is_good(checks) else "bad")
    # They read the verdict from a store that ends with this process.
    meeting.read_all("bye", [node.node for node in nodes[1:]], _BYE_SECONDS)
    return Findings(is_good(checks), tuple(checks))


def _gather_facts(patient: Patient) -> tuple[list[NodeFacts], list[Check]]:
    """Return what all nodes found, this one first, and those that tell nothing as checks."""
    seconds = patient.wanted.timeout_seconds
    others = range(1, patient.place.num_nodes)
    here = patient.meeting.read_all("here", others, seconds)
    checks = [_missing(patient, node, f"didn't come within {seconds:g} s") for node in others if node not in here]
    # Each of the things that a node looks at may take it one timeout.
    told = patient.meeting.read_all("facts", sorted(here), 3 * seconds)
    checks += [_missing(patient, node, "came, and told nothing of itself") for node in sorted(here) if node not in told]
    nodes = [patient.facts]
    for node in sorted(told):
        try:
            nodes.append(NODE.read(told[node]))
        except ValidationError:
            found = f"{patient.place.name_of(node)} tells of itself what this version doesn't understand"
            remedy = "it has another version of megatron_kosmos: give every node the same environment"
            checks.append(Check("versions", Status.BAD, found, remedy))
    return nodes, checks


def _needs(patient: Patient) -> tuple[Needs | None, list[Check]]:
    """Return what the run takes, where there is a run whose plan can be made; what keeps it from that as checks."""
    wanted = patient.wanted
    if wanted.run is None or wanted.plan_needs is None or patient.facts.refusal:
        return None, []
    try:
        return within(wanted.timeout_seconds, wanted.plan_needs, wanted.run, patient.world_size), []
    except ConfigError as error:
        return None, [Check("run", Status.BAD, str(error), "mend it; training would stop on the same")]
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        found = f"{patient.place.name} can't plan the run, so memory and disk are held against no need: {reason}"
        return None, [Check("run", Status.WARN, found, "kosmos train --dry-run says more; --timeout, if it is slow")]


def _judge_together(patient: Patient, nodes: list[NodeFacts], needs: Needs | None) -> list[Check]:
    """Let those that are here look for each other's tokens and read their clocks."""
    meeting, seconds = patient.meeting, patient.wanted.timeout_seconds
    tokens = {node.node: node.folder.token for node in nodes}
    meeting.tell("tokens", json.dumps(tokens))
    here = [node.node for node in nodes[1:]]
    hidden = {0: unseen(patient, tokens)}
    told = meeting.read_all("unseen", here, 2 * seconds)
    hidden |= {node: json.loads(text) for node, text in told.items()}
    deadline = time.monotonic() + seconds
    offsets = {node: meeting.read_clock(node, deadline - time.monotonic()) for node in sorted(told)}
    silent = [node for node in here if offsets.get(node) is None]
    checks = [_missing(patient, node, "came, and then fell silent") for node in silent]
    checks += judge_folder(nodes, hidden, needs)
    names = {node.node: node.name for node in nodes}
    return checks + judge_clocks(names, {node: offset for node, offset in offsets.items() if offset is not None})


def _judge_sums(patient: Patient, nodes: list[NodeFacts], may_try: bool) -> list[Check]:
    """Let all ranks of all nodes try the collectives, unless something is bad already."""
    place, wanted, meeting = patient.place, patient.wanted, patient.meeting
    if not may_try:
        meeting.tell("order", "null")
        return [Check("all-reduce", Status.WARN, "not tried, for what is bad above")]
    gathering = Gathering(
        address=meeting.address,
        port=meeting.port,
        first_rank=0,
        world_size=patient.world_size,
        neighbour_distance=wanted.num_workers if place.num_nodes > 1 else 1,
        timeout_seconds=wanted.timeout_seconds,
    )
    meeting.tell("order", json.dumps(asdict(gathering)))
    ranks = list(patient.workers.sums(gathering))
    told = meeting.read_all("sums", range(1, place.num_nodes), 2 * wanted.timeout_seconds)
    for node in range(1, place.num_nodes):
        lost = SumFacts(error="its node fell silent", is_silent=True)
        ranks += SUMS.read(told[node]) if node in told else [lost] * wanted.num_workers

    def name_of(rank: int) -> str:
        node, local_rank = divmod(rank, wanted.num_workers)
        return f"rank {rank} ({nodes[node].name}, {'process' if wanted.on_cpu else 'GPU'} {local_rank})"

    return judge_sums(ranks, name_of)


def _missing(patient: Patient, node: int, how: str) -> Check:
    remedy = f"{_WAYS_TO_FAIL}; leave it out: sbatch --exclude=NODE"
    return Check("nodes", Status.BAD, f"{patient.place.name_of(node)} {how}", remedy)
