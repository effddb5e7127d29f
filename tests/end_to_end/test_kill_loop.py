"""A run that is killed again and again has, in the end, the series of one that never was, and always a checkpoint."""

import faulthandler
import json
import os
import random
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from megatron_kosmos.checkpoint.folders import complete_folder, finished_steps, leftovers
from megatron_kosmos.checkpoint.load import find_latest, read_state, read_tensors
from megatron_kosmos.cli.main import build_app
from megatron_kosmos.data.packing.row_format import RowFormat
from megatron_kosmos.data.preparation.preprocess import Preparation, prepare
from megatron_kosmos.data.tokenization.making import TrainingSettings, train_tokenizer
from megatron_kosmos.engine import run as _imported_before_ranks_are_forked  # noqa: F401

pytestmark = pytest.mark.distributed

RANKS = 2
CONFIG = Path(__file__).parents[2] / "configs" / "kosmos_tiny.yaml"
TINY = [
    *(
        "model.decoder.num_layers=2",
        "model.decoder.width=32",
        "model.decoder.ffn_width=64",
        "model.decoder.dropout=0.1",
    ),
    *("model.decoder.vocab_size=400", "model.decoder.vocab_multiple=16", "model.vision.width=16"),
    *("model.vision.ffn_width=32", "model.vision.num_heads=2", "model.resampler.num_latents=4"),
    *("training.micro_batch_size=1", "training.global_batch_size=2", "training.precision=bf16"),
    *("optimizer.warmup_steps=3", "data.sequence_length=64", "data.heldout=[]", "checkpoint.every=2"),
]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a tiny run on pages of Python's manual."""
    folder = tmp_path_factory.mktemp("data")
    pages = list(topics.values())[:20]
    train_tokenizer(pages, TrainingSettings(400)).save(folder / "tokenizer")
    source = folder / "pages.jsonl"
    source.write_text("\n".join(json.dumps({"text": page}) for page in pages))
    row_format = RowFormat(sequence_length=64, num_latents=4)
    prepare(Preparation("text", (source,), folder / "pages", folder / "tokenizer", row_format=row_format))
    train = f"data.train=[{{kind: text, prefix: {folder / 'pages'}}}]"
    return [*TINY, f"data.tokenizer={folder / 'tokenizer'}", train]


@dataclass
class Life:
    """The processes of `kosmos train` from a start to their end."""

    run_dir: Path
    settings: list[str]
    metrics_before: int | None = field(init=False)
    ranks: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.metrics_before = self._inode()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.ranks = [self._fork(rank, port) for rank in range(RANKS)]

    def _fork(self, rank: int, port: int) -> int:
        child = os.fork()
        if child:
            return child
        try:
            output = os.open(
                self.run_dir.with_name(f"{self.run_dir.name}_{rank}.out"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            )
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(RANKS))
            os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(RANKS))
            torch.set_num_threads(1)
            overrides = [*self.settings, f"run_dir={self.run_dir}"]
            build_app()(["train", "--config", str(CONFIG), *overrides], standalone_mode=False)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(1)

    def finish(self) -> list[int]:
        """Wait for the ranks and return their exit codes."""
        return [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in self.ranks]

    def train_steps(self, number: int) -> bool:
        """Wait until so many steps are done; return whether all ranks are still there."""
        while self._inode() == self.metrics_before:  # a run that starts writes its metrics anew
            if not self._is_alive():
                return False
        goal = len(series(self.run_dir)) + number
        while len(series(self.run_dir)) < goal:
            if not self._is_alive():
                return False
        return True

    def begin_saves(self, number: int) -> bool:
        """Wait until so many saves have begun to write; return whether all ranks are still there."""
        begun = self._folders_being_written()
        while number:
            if not self._is_alive():
                return False
            being_written = self._folders_being_written()
            number = max(0, number - len(being_written - begun))
            begun |= being_written
        return True

    def kill(self, draw: random.Random) -> None:
        """Kill the ranks one after the other."""
        for rank in draw.sample(self.ranks, RANKS):
            os.kill(rank, signal.SIGKILL)
            time.sleep(draw.choice((0, 0.002, 0.02)))
        self.finish()

    def _is_alive(self) -> bool:
        time.sleep(0.002)
        ended = [os.waitid(os.P_PID, rank, os.WEXITED | os.WNOHANG | os.WNOWAIT) for rank in self.ranks]
        return not any(ended)

    def _folders_being_written(self) -> set[tuple[str, int]]:
        folders = set()
        for path in (self.run_dir / "checkpoints").glob(".*.writing"):
            with suppress(FileNotFoundError):  # it got its name meanwhile
                folders.add((path.name, path.stat().st_ino))
        return folders

    def _inode(self) -> int | None:
        metrics = self.run_dir / "metrics.jsonl"
        return metrics.stat().st_ino if metrics.exists() else None


def series(run_dir: Path) -> list[tuple[float, ...]]:
    """Step, loss, gradient norm and learning rate of every complete line of the metrics."""
    lines = (run_dir / "metrics.jsonl").read_text().split("\n")[:-1]
    return [tuple(json.loads(line)[key] for key in ("step", "loss", "grad_norm", "lr")) for line in lines]


def newest_checkpoint(run_dir: Path) -> int:
    """Return the step of the newest checkpoint, having read every byte of it; 0 without one."""
    root = run_dir / "checkpoints"
    newest = find_latest(root)
    if newest is None:
        assert not finished_steps(root)
        return 0
    step = finished_steps(root)[0]
    assert newest == complete_folder(root, step)  # none that bears a name was passed over
    state = read_state(newest)
    assert (state["step"], len(dict(read_tensors(newest))) > 100) == (step, True)
    assert (root / "latest").exists() or step == 2
    return step


def kill_again_and_again(run_dir: Path, settings: list[str], num_kills: int, seed: int) -> int:
    """Start and kill a run; return how often amid a save."""
    draw = random.Random(seed)
    newest, kills_amid_saves = 0, 0
    for kill in range(num_kills):
        life = Life(run_dir, settings)
        if kill % 8 == 7:
            time.sleep(draw.uniform(0, 1.5))  # somewhere in the start
        elif kill % 2:
            assert life.begin_saves(draw.choice((1, 2, 2))), f"the run ended before kill {kill}, or failed"
            time.sleep(draw.choice((0, 0, 0.003, 0.03, 0.1, 0.3)))  # anywhere in the save, or behind it
        else:
            assert life.train_steps(draw.randint(1, 4)), f"the run ended before kill {kill}, or failed"
            time.sleep(draw.uniform(0, 0.1))  # about a step
        life.kill(draw)
        kills_amid_saves += bool(leftovers(run_dir / "checkpoints"))
        before, newest = newest, newest_checkpoint(run_dir)
        assert newest >= before
        assert newest <= len(series(run_dir))
        print(
            f"kill {kill + 1}: {len(series(run_dir))} steps, checkpoint {newest}, {kills_amid_saves} kills amid saves"
        )
    return kills_amid_saves


def assert_kills_leave_no_trace(settings: list[str], folder: Path, num_kills: int, seed: int) -> int:
    undisturbed = Life(folder / "undisturbed", settings)
    assert undisturbed.finish() == [0] * RANKS, (folder / "undisturbed_0.out").read_text()
    kills_amid_saves = kill_again_and_again(folder / "killed", settings, num_kills, seed)
    assert Life(folder / "killed", settings).finish() == [0] * RANKS, (folder / "killed_0.out").read_text()
    assert series(folder / "killed") == series(folder / "undisturbed")
    assert not leftovers(folder / "killed" / "checkpoints")
    return kills_amid_saves


def test_three_kills_leave_no_trace(settings: list[str], tmp_path: Path) -> None:
    assert_kills_leave_no_trace([*settings, "training.steps=16"], tmp_path, num_kills=3, seed=0)
    assert len(series(tmp_path / "killed")) == 16


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_a_hundred_kills_leave_no_trace(settings: list[str], tmp_path: Path) -> None:
    faulthandler.cancel_dump_traceback_later()  # which pyproject.toml gives any test five minutes for
    long = [*settings, "training.steps=250"]
    assert assert_kills_leave_no_trace(long, tmp_path, num_kills=100, seed=1) > 5
    assert len(series(tmp_path / "killed")) == 250
