"""Trainings of a tiny KOSMOS, submitted as a user submits the real one, and what came of them."""

import io
import json
import os
import random
import signal
import tarfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import yaml
from PIL import Image

from megatron_kosmos.data.packing.row_format import RowFormat
from megatron_kosmos.data.preparation.preprocess import Preparation, prepare
from megatron_kosmos.data.tokenization.making import TrainingSettings, train_tokenizer
from tests.slurm.cluster import Cluster, Job, until

ROW_FORMAT = RowFormat(sequence_length=64, num_latents=4)


@dataclass(frozen=True)
class TinyData:
    """Sources, tokenizer and prepared corpora of a tiny training."""

    folder: Path

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def captions(self) -> Path:
        return self.folder / "noise.tar"

    @property
    def config(self) -> Path:
        """What makes configs/kosmos_tiny.yaml tiny enough for 16 processes on two cores."""
        return self.folder / "tiny.yaml"

    def make(self) -> None:
        """Write all of it: pages of Python's manual, noise with captions, and the configuration that reads them."""
        pages = list(topics.values())[:20]
        train_tokenizer(pages, TrainingSettings(400)).save(self.tokenizer)
        (self.folder / "pages.jsonl").write_text("\n".join(json.dumps({"text": page}) for page in pages))
        draw = random.Random(0)
        with tarfile.open(self.captions, "w") as tar:
            for number in range(800):
                picture = io.BytesIO()
                Image.frombytes("RGB", (32, 32), draw.randbytes(32 * 32 * 3)).save(picture, "PNG")
                caption = f"noise of the {number % 10}th kind, number {number}".encode()
                for suffix, content in (("png", picture.getvalue()), ("txt", caption)):
                    entry = tarfile.TarInfo(f"{number:04}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
        self.prepare("text", self.folder / "pages.jsonl", self.folder / "text")
        self.prepare("caption", self.captions, self.folder / "captions")
        self.config.write_text(yaml.safe_dump(self._settings()))

    def prepare(self, kind: str, source: Path, output: Path) -> None:
        """Prepare a corpus in this one process."""
        options = {"row_format": ROW_FORMAT, "part_bytes": 1 << 20}
        prepare(Preparation(kind, (source,), output, self.tokenizer, **options))  # type: ignore[arg-type]

    def _settings(self) -> dict[str, object]:
        sizes = {"num_layers": 2, "width": 32, "ffn_width": 64, "vocab_size": 400, "vocab_multiple": 16}
        corpora = [{"kind": kind, "prefix": str(self.folder / name)} for kind, name in CORPORA.items()]
        return {
            "model": {
                "decoder": sizes | {"dropout": 0.1},
                "vision": {"width": 16, "ffn_width": 32, "num_heads": 2},
                "resampler": {"num_latents": ROW_FORMAT.num_latents},
            },
            "parallel": {"tensor_parallel_size": 2, "sequence_parallel": True, "pipeline_parallel_size": 2},
            "training": {"micro_batch_size": 1, "global_batch_size": 4, "precision": "bf16"},
            "optimizer": {"warmup_steps": 3},
            "data": {
                "tokenizer": str(self.tokenizer),
                "sequence_length": ROW_FORMAT.sequence_length,
                "train": corpora,
                "heldout": [],
            },
            "checkpoint": {"every": 4},
        }


CORPORA = {"text": "text", "caption": "captions"}


@dataclass(frozen=True)
class Run:
    """A run folder, and the jobs that train there."""

    cluster: Cluster
    data: TinyData
    folder: Path

    def submit(self, steps: int, *settings: str, **variables: str) -> Job:
        """Submit launch/pretrain_kosmos_64gpu.sh for two nodes of two ranks, or as `variables` say."""
        environment = {
            "NODES": "2",
            "GPUS_PER_NODE": "2",
            "TIME": "00:30:00",
            "CONFIG": f"configs/kosmos_tiny.yaml {self.data.config}",
            "RUN_DIR": str(self.folder),
            "PREFLIGHT": "0",
            "PREFLIGHT_OPTIONS": "--cpu --timeout 200",
            "MAX_RESTARTS": "30",
        }
        overrides = (f"training.steps={steps}", *settings)
        script = "launch/pretrain_kosmos_64gpu.sh"
        told = self.cluster.call("bash", script, *overrides, environment=environment | variables)
        return self.cluster.job(told.split()[1])

    def series(self) -> list[tuple[float, ...]]:
        """Step, loss, gradient norm and learning rate of every complete line of the metrics."""
        metrics = self.folder / "metrics.jsonl"
        lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
        return [tuple(json.loads(line)[key] for key in ("step", "loss", "grad_norm", "lr")) for line in lines]

    def reach(self, step: int, job: Job) -> None:
        """Wait till the run got to a step."""
        until(lambda: len(self.series()) >= step or job.state == "FAILED", f"step {step} of {self.folder}")
        assert job.state != "FAILED", job.log

    def signal_rank(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank; its launcher and the other ranks get none."""
        (process,) = self.processes(rank)
        os.kill(process, number)

    def processes(self, rank: int | None = None) -> list[int]:
        """Processes that train here, launchers included, or those of one rank."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it ended meanwhile
                arguments = (process / "cmdline").read_bytes().split(b"\0")
                variables = (process / "environ").read_bytes().split(b"\0")
                if f"run_dir={self.folder}".encode() in arguments and (
                    rank is None or f"RANK={rank}".encode() in variables
                ):
                    found.append(int(process.name))
        return found

    def checkpoints(self) -> list[int]:
        """Steps of the checkpoints that have their names."""
        return sorted(int(path.name[5:]) for path in (self.folder / "checkpoints").glob("step_*"))
