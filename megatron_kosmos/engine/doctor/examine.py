"""The examination of one node: it looks at itself, meets the others, and leads or follows."""

import torch

from megatron_kosmos.config import ConfigError
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.engine.doctor.checks import Check, Status
from megatron_kosmos.engine.doctor.deadline import within
from megatron_kosmos.engine.doctor.facts import NodeFacts
from megatron_kosmos.engine.doctor.follow import follow
from megatron_kosmos.engine.doctor.lead import lead
from megatron_kosmos.engine.doctor.meeting import Meeting, NoMeetingError, Place
from megatron_kosmos.engine.doctor.memory import available_memory, free_shared_memory
from megatron_kosmos.engine.doctor.patient import Findings, Patient, Wanted
from megatron_kosmos.engine.doctor.shared_folder import SharedFolder
from megatron_kosmos.engine.doctor.versions import unfit_here, versions_here
from megatron_kosmos.engine.doctor.workers import Workers
from megatron_kosmos.engine.preflight import check_before_start


def examine(place: Place, wanted: Wanted) -> Findings:
    """Examine this node, and with the others the job. Ends in bounded time, whatever the others do.

    Collective over the nodes of the job, which meet by name and port of the first one.
    """
    with Workers(wanted.num_workers, wanted.on_cpu) as workers:
        try:
            meeting = Meeting(place, wanted.timeout_seconds)
            meeting.tell(f"here/{place.node}", "")
            folder = SharedFolder(wanted.run_dir, wanted.timeout_seconds)
            facts = _look_at_node(place, wanted, workers, folder)
            patient = Patient(place, wanted, meeting, workers, folder, facts)
            try:
                return lead(patient) if place.node == 0 else follow(patient)
            finally:
                folder.clear(facts.folder.token, with_others=place.node == 0)
        except NoMeetingError as error:
            return Findings(False, (Check("nodes", Status.BAD, f"{place.name}: {error}"),))


def _look_at_node(place: Place, wanted: Wanted, workers: Workers, folder: SharedFolder) -> NodeFacts:
    """Return what this node finds on its own."""
    return NodeFacts(
        node=place.node,
        name=place.name,
        versions=versions_here(),
        unfit=unfit_here(),
        devices=workers.devices(wanted.timeout_seconds),
        num_gpus=torch.cuda.device_count(),
        available_memory=available_memory(),
        shared_memory=free_shared_memory(),
        folder=folder.leave_token(place.node),
        refusal=wanted.refusal or _refusal(place, wanted),
    )


def _refusal(place: Place, wanted: Wanted) -> str:
    """Return why the run would not start here, empty if it would or none is given."""
    if wanted.run is None:
        return ""
    try:
        within(wanted.timeout_seconds, check_before_start, wanted.run, place.num_nodes * wanted.num_workers)
    except (ConfigError, DataError, OSError) as error:  # TimeoutError is one
        return str(error)
    return ""
