"""The part of every node but the first: it tells what it found, and does what the first one asks."""

import json
from contextlib import suppress
from dataclasses import replace

from megatron_kosmos.engine.doctor.meeting import NoMeetingError
from megatron_kosmos.engine.doctor.patient import NODE, SUMS, Findings, Patient
from megatron_kosmos.engine.doctor.workers import Gathering

GOOD = "good"
"""The verdict on a job that may start."""
_PATIENCE = 6
"""Timeouts to wait for the first node, which waits for several things itself. If it ends, nobody waits for it."""


def follow(patient: Patient) -> Findings:
    """Take part, and return the first node's verdict. Raises NoMeetingError where that one goes or stays silent."""
    node, meeting = patient.place.node, patient.meeting
    meeting.tell(f"facts/{node}", NODE.write(patient.facts))
    tokens = {int(other): token for other, token in json.loads(_wait_for(patient, "tokens")).items()}
    meeting.tell(f"unseen/{node}", json.dumps(unseen(patient, tokens)))
    meeting.answer_clock(node, _PATIENCE * patient.wanted.timeout_seconds)
    order = json.loads(_wait_for(patient, "order"))
    if order is not None:
        gathering = replace(Gathering(**order), first_rank=node * patient.wanted.num_workers)
        meeting.tell(f"sums/{node}", SUMS.write(patient.workers.sums(gathering)))
    verdict = _wait_for(patient, "verdict")
    with suppress(NoMeetingError):  # the first node may be gone by now, and what it found is known
        meeting.tell(f"bye/{node}", "")
    return Findings(verdict == GOOD, ())


def unseen(patient: Patient, tokens: dict[int, str]) -> list[int]:
    """Return the nodes whose token, in `tokens`, doesn't show up on this one."""
    own = patient.facts.folder
    others = {token: node for node, token in tokens.items() if node != patient.place.node and token}
    if own.error:
        return []  # it is told that this node has no folder at all
    return [others[token] for token in patient.folder.unseen(list(others))]


def _wait_for(patient: Patient, key: str) -> str:
    seconds = _PATIENCE * patient.wanted.timeout_seconds
    told = patient.meeting.read(key, seconds)
    if told is None:
        raise NoMeetingError(f"{patient.place.name_of(0)}, the first node, told no {key} within {seconds:g} s")
    return told
