"""What the ranks' collectives amount to: who sends or gets wrong data, who fell silent, who is slowest."""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence

from rich.filesize import decimal

from megatron_kosmos.engine.doctor.checks import Check, Status, first_of
from megatron_kosmos.engine.doctor.facts import SumFacts

_SUBJECT = "all-reduce"
_SLOW = 1.5
"""Times the median rank's time that a rank may take without a warning."""
_NETWORK = (
    "look at that node's network and GPU (ibstat, nvidia-smi, dmesg); NCCL_DEBUG=INFO says which way NCCL took; "
    "leave the node out: sbatch --exclude=NODE"
)


def judge_sums(ranks: Sequence[SumFacts], name_of: Callable[[int], str]) -> list[Check]:
    """Judge what all ranks found, in their order. `name_of` says where a rank is."""
    if any(rank.error for rank in ranks):
        return [_judge_failure(ranks, name_of)]
    if wrong := _judge_wrong(ranks, name_of):
        return [wrong]
    checks = []
    if len(ranks) > 1:
        checks += [_bandwidth(ranks), _slowest_link(ranks, name_of)]
    checks.append(_slowest_work(ranks, name_of))
    return checks


def _judge_failure(ranks: Sequence[SumFacts], name_of: Callable[[int], str]) -> Check:
    """Name the ranks that hang or are gone, or all that failed where each says why: the rest only waited for them."""
    failed = [number for number, rank in enumerate(ranks) if rank.error]
    silent = [number for number in failed if ranks[number].is_silent]
    suspects = silent or failed
    told = (f"{name_of(number)}, {ranks[number].stage}: {ranks[number].error}" for number in suspects)
    return Check(_SUBJECT, Status.BAD, f"{len(failed)} of {len(ranks)} ranks failed. {first_of(told, '; ')}", _NETWORK)


def _judge_wrong(ranks: Sequence[SumFacts], name_of: Callable[[int], str]) -> Check | None:
    """Name the ranks that stand in most wrong deliveries, as sender or as receiver."""
    if not any(rank.wrong_sums or rank.wrong_senders for rank in ranks):
        return None
    counts = Counter(
        one for receiver, rank in enumerate(ranks) for sender in rank.wrong_senders for one in {sender, receiver}
    )
    if counts:
        most = max(counts.values())
        suspects = first_of((name_of(number) for number in sorted(counts) if counts[number] == most), "; ")
        found = f"sums are wrong: data of {suspects} arrive changed"
    else:
        suspects = first_of((name_of(number) for number, rank in enumerate(ranks) if rank.wrong_sums), "; ")
        found = f"sums are wrong on {suspects}, while what each rank sends arrives whole"
    return Check(_SUBJECT, Status.BAD, found, f"the numbers of a training would be wrong: {_NETWORK}")


def _bandwidth(ranks: Sequence[SumFacts]) -> Check:
    """Tell the time of each size, of the rank that took longest, and its bus bandwidth, as nccl-tests define it."""
    told = []
    for number, num_bytes in enumerate(ranks[0].num_bytes):
        seconds = max(rank.seconds[number] for rank in ranks)
        bus = 2 * (len(ranks) - 1) / len(ranks) * num_bytes / seconds
        told.append(f"{decimal(num_bytes)} in {_time(seconds)} ({decimal(int(bus))}/s)")
    return Check(_SUBJECT, Status.GOOD, f"{len(ranks)} ranks, sums right; {', '.join(told)}")


def _slowest_link(ranks: Sequence[SumFacts], name_of: Callable[[int], str]) -> Check:
    """Name the rank whose ways in and out are both slow: a slow node slows what it sends and what it receives."""
    way_out = {rank.sender: rank.link_seconds for rank in ranks}
    times = [min(rank.link_seconds, way_out[number]) for number, rank in enumerate(ranks)]
    remedy = f"{_NETWORK}; is it on another switch?"
    rate = [int(ranks[0].link_bytes / max(seconds, 1e-9)) for seconds in times]
    return _slowest("links", times, name_of, lambda number: f"{decimal(rate[number])}/s", remedy)


def _slowest_work(ranks: Sequence[SumFacts], name_of: Callable[[int], str]) -> Check:
    remedy = "throttled or shared? nvidia-smi -q -d PERFORMANCE,TEMPERATURE there; leave the node out: sbatch --exclude"
    times = [rank.work_seconds for rank in ranks]
    return _slowest("computing", times, name_of, lambda number: _time(times[number]), remedy)


def _slowest(
    subject: str, times: Sequence[float], name_of: Callable[[int], str], tell: Callable[[int], str], remedy: str
) -> Check:
    middle = statistics.median(times)
    slowest = max(range(len(times)), key=times.__getitem__)
    factor = times[slowest] / max(middle, 1e-9)
    if len(times) == 1:
        return Check(subject, Status.GOOD, tell(0))
    found = f"the slowest is {name_of(slowest)}: {tell(slowest)}, {factor:.2f} times the median's time"
    if factor > _SLOW:
        return Check(subject, Status.WARN, found, remedy)
    return Check(subject, Status.GOOD, found)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
