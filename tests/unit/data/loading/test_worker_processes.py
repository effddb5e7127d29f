"""Worker processes read no further ahead than they may, end with the trainer, and nothing grows or is left behind."""

import ctypes
import multiprocessing
import os
import select
import signal
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from pathlib import Path

import pytest

from megatron_kosmos.batch import MultimodalBatch
from megatron_kosmos.config import CorpusConfig, DataConfig
from megatron_kosmos.data.loading.collate import Collator, Microbatch
from megatron_kosmos.data.loading.loader import PREFETCH, BatchGeometry, ImageFormat, StepLoader
from megatron_kosmos.data.loading.mixture import Mixture, Sample
from megatron_kosmos.prompt import SourceKind

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

SHARED_MEMORY = Path("/dev/shm")
WAIT_SECONDS = 60


@pytest.fixture
def data(prepare_blend: Callable[..., tuple[CorpusConfig, ...]], tokenizer_folder: Path) -> DataConfig:
    """Captions and texts, enough for epochs to be long: what is remembered of each is no leak."""
    lines: dict[SourceKind, list[dict[str, object]]] = {
        "text": [{"text": f"{number} bottles of beer on the wall " * 50} for number in range(60)],
        "caption": [{"image": f"{number % 9}.png", "caption": f"picture {number}"} for number in range(300)],
    }
    return DataConfig(tokenizer=tokenizer_folder, sequence_length=64, train=prepare_blend(lines, 9), num_workers=2)


def steps_of(data: DataConfig, num_steps: int = 1_000_000) -> Generator[list[MultimodalBatch]]:
    """Return steps of one microbatch."""
    loader = StepLoader(data, ImageFormat(4, 8), BatchGeometry(2, 2), seed=5, plan_folder=data.tokenizer.parent / "p")
    return loader.steps(0, num_steps)


def wait_for_end(pidfds: Iterable[int]) -> bool:
    """Whether these processes have ended, or do so while we wait."""
    return all(select.select([pidfd], [], [], WAIT_SECONDS)[0] for pidfd in pidfds)


def start_trainer(data: DataConfig) -> tuple[int, dict[int, int]]:
    """Fork a process, a session of its own, that reads until it is stopped; return it and its workers with pidfds."""
    reading, writing = os.pipe()
    trainer = os.fork()
    if trainer == 0:
        code = 1
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup has it ignored
            with closing(steps_of(data)) as steps:
                next(steps)
                os.write(writing, " ".join(str(child.pid) for child in multiprocessing.active_children()).encode())
                for _ in steps:
                    pass
        except KeyboardInterrupt:
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        workers = os.read(pipe.fileno(), 100).split()
    assert len(workers) == 2
    return trainer, {int(worker): os.pidfd_open(int(worker)) for worker in workers}


def shared_memory_of(processes: list[int]) -> list[str]:
    """Return what torch has left of these processes in /dev/shm, which others use at the same time."""
    names = tuple(f"torch_{process}_" for process in processes)
    return [path.name for path in SHARED_MEMORY.iterdir() if path.name.startswith(names)]


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGINT, 0)], ids=["killed", "interrupted"])
def test_workers_end_with_the_trainer(data: DataConfig, number: signal.Signals, code: int) -> None:
    trainer, workers = start_trainer(data)
    if number == signal.SIGINT:
        os.killpg(trainer, number)  # as a terminal does
    else:
        os.kill(trainer, number)
    assert os.waitstatus_to_exitcode(os.waitpid(trainer, 0)[1]) == code
    assert wait_for_end(workers.values())
    assert shared_memory_of([trainer, *workers]) == []


def test_an_error_of_the_trainer_ends_the_workers(data: DataConfig) -> None:
    steps = steps_of(data)
    next(steps)
    workers = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
    assert len(workers) == 2
    with pytest.raises(ZeroDivisionError), closing(steps):
        _ = 1 / len(next(steps)[0].images[:0])
    assert multiprocessing.active_children() == []
    assert shared_memory_of([os.getpid(), *workers]) == []


def test_workers_read_no_further_ahead_than_they_may(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, lead = multiprocessing.Value("i", 0), multiprocessing.Value("i", 0)
    locate = Mixture.__getitem__

    def read_and_note(mixture: Mixture, index: int) -> Sample:
        with lead.get_lock():
            lead.value = max(lead.value, index // 2 - taken.value)
        return locate(mixture, index)

    monkeypatch.setattr(Mixture, "__getitem__", read_and_note)
    num_ahead = PREFETCH * data.num_workers
    for _ in steps_of(data, 100):
        assert len(multiprocessing.active_children()) <= 2
        taken.value += 1
    assert 1 < lead.value <= num_ahead  # the one that is being taken included


MAX_KILOBYTES = 5_000
MAX_FILES = 60
"""Batches on their way hold some; a leak of one in each batch is 400 and more."""


class Usage:
    """What this process and its workers hold."""

    def __init__(self) -> None:
        workers = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
        processes = [os.getpid(), *workers]
        self.kilobytes = sum(memory_of(process) for process in processes)
        self.files = sum(len(os.listdir(f"/proc/{process}/fd")) for process in processes)
        self.shared = len(shared_memory_of(processes))


def memory_of(process: int) -> int:
    """Return the memory of a process that is no file's, in kB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def growth(data: DataConfig, warm_up: int, num_batches: int) -> tuple[int, int, int]:
    """Return what kilobytes, open files and entries of /dev/shm grow by over `num_batches` after a warm-up."""
    ctypes.CDLL(None).malloc_trim(0)  # what other tests have left free would hide a leak
    with closing(steps_of(data)) as steps:
        for _ in range(warm_up):
            next(steps)
        before = Usage()
        for _ in range(num_batches):
            next(steps)
        after = Usage()
    return after.kilobytes - before.kilobytes, after.files - before.files, after.shared - before.shared


def leak(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """Let every batch leave some memory behind in the process that makes it."""
    left: list[bytearray] = []
    collate = Collator.__call__

    def collate_and_leak(collator: Collator, samples: list[Sample]) -> Microbatch:
        left.append(bytearray(os.urandom(num_bytes)))
        return collate(collator, samples)

    monkeypatch.setattr(Collator, "__call__", collate_and_leak)


LONG = [pytest.mark.nightly, pytest.mark.timeout(1800)]
SOAKS = [pytest.param(400, id="short"), pytest.param(10_000, id="long", marks=LONG)]


@pytest.mark.parametrize("num_batches", SOAKS)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_nothing_grows(data: DataConfig, num_workers: int, num_batches: int) -> None:
    config = data.model_copy(update={"num_workers": num_workers})
    kilobytes, files, shared = growth(config, num_batches // 5, num_batches)
    assert kilobytes < MAX_KILOBYTES
    assert files < MAX_FILES
    assert shared <= 0


@pytest.mark.parametrize("num_batches", SOAKS)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_leak_would_be_noticed(
    data: DataConfig, num_workers: int, num_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 1 KiB a batch in the long test."""
    leak(monkeypatch, 10_000 * 1024 // num_batches)
    config = data.model_copy(update={"num_workers": num_workers})
    assert growth(config, num_batches // 5, num_batches)[0] > MAX_KILOBYTES
