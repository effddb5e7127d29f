"""launch/: clean shell, settings that are checked, and a --dry-run that shows what would be submitted and run."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_kosmos.config import load_config

ROOT = Path(__file__).parents[3]
LAUNCH = ROOT / "launch"
CONFIGS = ROOT / "configs"
SUBMIT = LAUNCH / "pretrain_kosmos_64gpu.sh"
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch"), *ROOT.glob("tests/slurm/*.sh")])


def call(*command: Any, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script as on a machine where nothing of SLURM is installed."""
    kept = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "ENV_FILE": "/dev/null"}
    return subprocess.run(
        ["/bin/bash", *map(str, command)], env=kept | variables, text=True, capture_output=True, check=False
    )


def dry_run(script: Path, *arguments: str, **variables: str) -> list[list[str]]:
    """Return the words of each command that --dry-run prints."""
    result = call(script, "--dry-run", *arguments, **variables)
    assert result.returncode == 0, result.stderr
    return [shlex.split(line) for line in result.stdout.splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    result = subprocess.run([shellcheck, "-x", "-P", "SCRIPTDIR", script], text=True, capture_output=True, check=False)
    assert result.returncode == 0, result.stdout


def test_shellcheck_finds_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "bad.sh").write_text("#!/bin/bash\nrm -r $1/*\n")
    shellcheck = Path(sys.executable).with_name("shellcheck")
    assert subprocess.run([shellcheck, tmp_path / "bad.sh"], capture_output=True, check=False).returncode == 1


def test_the_64_gpu_job() -> None:
    submit, preflight, step, doctor, train = dry_run(SUBMIT, PARTITION="gpu", ACCOUNT="lab")
    assert submit[:3] == ["env", "CHAIN_LINK=1", "sbatch"]
    asked = {*submit}
    assert {"--nodes=8", "--gpus-per-node=8", "--ntasks-per-node=1", "--exclusive", "--requeue"} <= asked
    assert {"--partition=gpu", "--account=lab", "--dependency=singleton", "--signal=B:USR1@300"} <= asked
    assert {"--open-mode=append", f"--output={ROOT}/runs/kosmos1_64gpu/logs/%x-%j.out"} <= asked
    assert submit[-1] == str(LAUNCH / "pretrain.sbatch")
    assert (preflight[0], preflight[-1], step[0], step[-1]) == ("srun", "preflight", "srun", "train")
    assert "doctor" in doctor
    assert train[-4:] == ["train", "--config", "configs/kosmos1_64gpu.yaml", f"run_dir={ROOT}/runs/kosmos1_64gpu"]
    assert train[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert {"--nproc-per-node", "--node-rank", "HEAD_NODE:HEAD_PORT"} <= {*train}


def test_what_can_be_chosen() -> None:
    chosen = {
        "NODES": "2",
        "GPUS_PER_NODE": "4",
        "GPU_TYPE": "a100",
        "CPUS_PER_NODE": "32",
        "TIME": "1:00:00",
        "QOS": "high",
        "EXCLUDE": "n1,n2",
        "SBATCH_EXTRA": "--constraint=ib --comment='two words'",
        "SIGNAL_SECONDS": "120",
        "REQUEUE": "0",
        "CHAIN": "3",
        "PREFLIGHT": "0",
        "LAUNCHER": "deepspeed",
        "LAYOUT": "dp",
        "RUN_DIR": "/scratch/run",
        "OVERRIDES": "training.steps=5 'data.train=[{kind: text, prefix: a}]'",
    }
    *submits, step, train = dry_run(SUBMIT, "training.seed=2", **chosen)
    assert [submit[1] for submit in submits] == ["CHAIN_LINK=1", "CHAIN_LINK=2", "CHAIN_LINK=3"]
    asked = {*submits[0]}
    assert {"--nodes=2", "--gpus-per-node=a100:4", "--cpus-per-task=32", "--time=1:00:00", "--qos=high"} <= asked
    assert {"--exclude=n1,n2", "--constraint=ib", "--comment=two words", "--signal=B:USR1@120"} <= asked
    assert "--no-requeue" in asked
    assert not {"--requeue", "--exclusive"} & asked
    assert (step[0], step[-1]) == ("srun", "train")
    assert {"deepspeed.launcher.runner", "--no_ssh", "--node_rank"} <= {*train}
    assert train[-3:] == ["training.steps=5", "data.train=[{kind: text, prefix: a}]", "training.seed=2"]
    assert "configs/kosmos1_64gpu_dp.yaml" in train


def test_settings_of_the_file_count_but_those_of_the_call_win(tmp_path: Path) -> None:
    (tmp_path / "env.sh").write_text(': "${NODES:=4}"\n: "${PARTITION:=ours}"\n')
    submit, *_ = dry_run(SUBMIT, ENV_FILE=str(tmp_path / "env.sh"), PARTITION="theirs")
    assert {"--nodes=4", "--partition=theirs"} <= {*submit}


@pytest.mark.parametrize(
    "container, step_has, command_begins",
    [
        ("registry#kosmos:1", "--container-image=registry#kosmos:1", ["python3"]),
        ("/images/kosmos.sqsh", "--container-image=/images/kosmos.sqsh", ["python3"]),
        ("/images/kosmos.sif", "--label", ["apptainer", "exec", "--nv"]),
    ],
)
def test_containers(container: str, step_has: str, command_begins: list[str]) -> None:
    _, _, step, _, train = dry_run(SUBMIT, CONTAINER=container, PYTHON="", RUN_DIR="/scratch/run")
    assert step_has in step
    assert train[: len(command_begins)] == command_begins
    mounts = f"{ROOT}:{ROOT},/scratch/run:/scratch/run"
    assert any(mounts in word for word in step + train)


@pytest.mark.parametrize(
    "variables, says",
    [
        ({"NODES": "eight"}, "NODES=eight must be a whole number, at least 1"),
        ({"NODES": "0"}, "NODES=0 must be a whole number, at least 1"),
        ({"REQUEUE": "yes"}, "REQUEUE=yes must be one of: 0 1"),
        ({"LAUNCHER": "mpirun"}, "LAUNCHER=mpirun must be one of: torchrun deepspeed"),
        ({"LAYOUT": "tp8"}, "LAYOUT=tp8 must be one of: tp2_pp2 dp"),
        ({"CONFIG": "configs/none.yaml"}, "CONFIG: no file configs/none.yaml"),
        ({"OVERRIDES": "a='b"}, "unbalanced quotes in: a='b"),
        ({"PYTHON": "/no/python"}, "no Python at /no/python"),
        ({"ENV_FILE": "/no/env.sh"}, "ENV_FILE=/no/env.sh is not there"),
    ],
)
def test_mistakes_are_named_before_anything_is_submitted(variables: dict[str, str], says: str) -> None:
    result = call(SUBMIT, "--dry-run", **variables)
    assert (result.returncode, result.stdout) == (2, "")
    assert says in result.stderr


def test_where_there_is_no_slurm_it_is_said(tmp_path: Path) -> None:
    for tool in ("bash", "basename", "dirname", "xargs", "printf", "mkdir"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or pytest.fail(tool))
    result = call(SUBMIT, RUN_DIR=str(tmp_path / "run"), PATH=str(tmp_path))
    assert result.returncode == 2
    assert "no sbatch here" in result.stderr


def test_one_node() -> None:
    (here,) = dry_run(LAUNCH / "pretrain_kosmos_8gpu.sh")
    assert here == ["bash", "launch/node.sh", "train"]
    (there,) = dry_run(LAUNCH / "pretrain_kosmos_8gpu.sh", SLURM_JOB_ID="1")
    assert (there[:2], there[-3:]) == (["srun", "--nodes=1"], here)
    submit, *_ = dry_run(LAUNCH / "pretrain_kosmos_8gpu.sh", SUBMIT="1")
    assert {"--nodes=1", f"--output={ROOT}/runs/kosmos1_8gpu/logs/%x-%j.out"} <= {*submit}


def test_an_array_prepares_and_a_job_behind_it_merges() -> None:
    arguments = ("text", "--input", "a b.jsonl", "--output", "data/text", "--tokenizer", "t", "--overwrite")
    array, merge = dry_run(LAUNCH / "preprocess_array.sh", *arguments, TASKS="7")
    (wrapped,) = [word.removeprefix("--wrap=") for word in array if word.startswith("--wrap=")]
    words = shlex.split(wrapped)
    assert words[words.index("preprocess") + 1 :] == [
        *(*arguments, "--shard-index"),
        *("$SLURM_ARRAY_TASK_ID", "--num-shards", "7"),
    ]
    assert "--array=0-6" in array
    (wrapped,) = [word.removeprefix("--wrap=") for word in merge if word.startswith("--wrap=")]
    assert shlex.split(wrapped)[-4:] == ["merge", "--output", "data/text", "--overwrite"]
    assert {"--dependency=afterok:ARRAY_ID", "--kill-on-invalid-dep=yes"} <= {*merge}


def test_export() -> None:
    (here,) = dry_run(LAUNCH / "convert_to_hf.sh", "out", "--no-verify", RUN_DIR="/runs/x")
    assert here == [sys.executable, "-m", "megatron_kosmos", "convert", "to-hf", "/runs/x", "out", "--no-verify"]
    (job,) = dry_run(LAUNCH / "convert_to_hf.sh", "out", SUBMIT="1", RUN_DIR="/runs/x")
    assert job[0] == "sbatch"
    assert job[-1].startswith("--wrap=exec srun")


def test_every_variable_is_explained_and_every_default_shown_is_the_default() -> None:
    example = (LAUNCH / "env.example.sh").read_text()
    documented = dict(re.findall(r'^#: "\$\{(\w+):=(.*?)\}"', example, re.MULTILINE))
    names = re.search(r"VARIABLES=\((.*?)\)", (LAUNCH / "settings.sh").read_text(), re.DOTALL)
    assert names is not None
    assert {*documented} == {*names[1].split()}
    docs = (ROOT / "docs" / "slurm.md").read_text()
    assert [name for name in documented if f"`{name}`" not in docs] == []
    settings = (LAUNCH / "settings.sh").read_text()
    for name, default in documented.items():
        assert not default or f'"${{{name}:={default}}}"' in settings or f"{name}:={default}" in settings, name


def differences(first: Any, second: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the settings in which two configurations differ."""
    if isinstance(first, dict) and isinstance(second, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in first:
            found |= differences(first[key], second[key], f"{path}.{key}".lstrip("."))
        return found
    return {} if first == second else {path: (first, second)}


def test_the_64_gpu_presets_train_what_kosmos1_trains() -> None:
    paper, layered, data_ranks = (
        load_config(CONFIGS / f"{name}.yaml") for name in ("kosmos1", "kosmos1_64gpu", "kosmos1_64gpu_dp")
    )
    first = differences(paper.model_dump(mode="json"), layered.model_dump(mode="json"))
    assert {*first} == {"run_dir", "checkpoint.every", "checkpoint.keep_every"}
    second = differences(layered.model_dump(mode="json"), data_ranks.model_dump(mode="json"))
    sizes = {f"parallel.{name}" for name in ("tensor_parallel_size", "sequence_parallel", "pipeline_parallel_size")}
    assert {*second} == {"run_dir", "training.micro_batch_size"} | sizes
    assert (layered.data_parallel_size(64), data_ranks.data_parallel_size(64)) == (16, 64)
    assert data_ranks.data_parallel_size(8) == 8  # what pretrain_kosmos_8gpu.sh trains
