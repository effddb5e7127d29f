"""A tiny run of `kosmos train` on two ranks: its processes from a start to their end, and what it leaves."""

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

import torch

from megatron_kosmos.cli.main import build_app
from megatron_kosmos.data.packing.row_format import RowFormat
from megatron_kosmos.data.preparation.preprocess import Preparation, prepare
from megatron_kosmos.data.tokenization.making import TrainingSettings, train_tokenizer
from megatron_kosmos.engine import run as _imported_before_ranks_are_forked  # noqa: F401

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


def prepare_settings(folder: Path) -> list[str]:
    """Prepare pages of Python's manual in `folder`, and return the overrides for a tiny run on them."""
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
            output = os.open(self._output(rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout = sys.stderr = open(1, "w", buffering=1)  # noqa: SIM115 (pytest has put others there)
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(RANKS))
            os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(RANKS))
            torch.set_num_threads(1)
            overrides = [*self.settings, f"run_dir={self.run_dir}"]
            build_app()(["train", "--config", str(CONFIG), *overrides], standalone_mode=False)
            os._exit(0)
        except SystemExit as error:
            if isinstance(error.code, int):
                os._exit(error.code)
            print(error.code, file=sys.stderr, flush=True)
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
            if not self.is_alive():
                return False
        goal = len(series(self.run_dir)) + number
        while len(series(self.run_dir)) < goal:
            if not self.is_alive():
                return False
        return True

    def begin_saves(self, number: int) -> bool:
        """Wait until so many saves have begun to write; return whether all ranks are still there."""
        begun = self._folders_being_written()
        while number:
            if not self.is_alive():
                return False
            being_written = self._folders_being_written()
            number = max(0, number - len(being_written - begun))
            begun |= being_written
        return True

    def said(self, rank: int) -> str:
        """Return what a rank has printed."""
        return self._output(rank).read_text()

    def kill(self, draw: random.Random) -> None:
        """Kill the ranks one after the other."""
        for rank in draw.sample(self.ranks, RANKS):
            os.kill(rank, signal.SIGKILL)
            time.sleep(draw.choice((0, 0.002, 0.02)))
        self.finish()

    def is_alive(self) -> bool:
        """Whether all ranks are still there; takes a moment."""
        time.sleep(0.002)
        ended = [os.waitid(os.P_PID, rank, os.WEXITED | os.WNOHANG | os.WNOWAIT) for rank in self.ranks]
        return not any(ended)

    def _output(self, rank: int) -> Path:
        return self.run_dir.with_name(f"{self.run_dir.name}_{rank}.out")

    def _folders_being_written(self) -> set[tuple[str, int]]:
        folders = set()
        for path in (self.run_dir / "checkpoints").glob(".*.writing"):
            with suppress(FileNotFoundError):  # it got its name meanwhile
                folders.add((path.name, path.stat().st_ino))
        return folders

    def _inode(self) -> int | None:
        metrics = self.run_dir / "metrics.jsonl"
        return metrics.stat().st_ino if metrics.exists() else None


def children(process: int) -> list[int]:
    """Return the child processes of one."""
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def is_running(process: int) -> bool:
    """Whether a process is there, and not only its exit code."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def series(run_dir: Path) -> list[tuple[float, ...]]:
    """Step, loss, gradient norm and learning rate of every complete line of the metrics."""
    lines = (run_dir / "metrics.jsonl").read_text().split("\n")[:-1]
    return [tuple(json.loads(line)[key] for key in ("step", "loss", "grad_norm", "lr")) for line in lines]
