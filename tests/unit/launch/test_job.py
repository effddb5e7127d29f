"""pretrain.sbatch where SLURM fails it: the script itself, with programs in SLURM's place that only fail."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def run_job(folder: Path, fails: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the job in `folder`/run, where srun fails in what has the word `fails`, and scontrol requeues nothing."""
    programs = folder / "bin"
    programs.mkdir()
    (folder / "run" / "logs").mkdir(parents=True, exist_ok=True)
    scripts = {
        "srun": f'[[ "$*" != *{fails}* ]]',
        "scontrol": "[[ $1 != show ]] || echo n0",
    }
    for name, body in scripts.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n[[ $? = 0 && $1 != requeue ]]\n")
        (programs / name).chmod(0o755)
    kept = {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHON": sys.executable, "ENV_FILE": "/dev/null"}
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n0", "RUN_DIR": str(folder / "run")}
    command = ["/bin/bash", str(ROOT / "launch" / "pretrain.sbatch")]
    return subprocess.run(
        command, cwd=ROOT, env=kept | job | variables, text=True, capture_output=True, check=False, timeout=60
    )


def test_the_word_of_an_earlier_start_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    """A finished run is to go on for more steps, and its ranks die before they have begun."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ended").write_text("finished\n")
    result = run_job(tmp_path, fails="train", PREFLIGHT="0")
    assert "the training broke off" in result.stdout
    assert "finished" not in result.stdout
    assert result.returncode == 75


def test_nodes_that_are_not_fit_end_the_job_of_a_person(tmp_path: Path) -> None:
    result = run_job(tmp_path, fails="preflight")
    assert "training was not started" in result.stdout
    assert result.returncode == 1


def test_nodes_that_are_not_fit_are_a_failure_in_a_later_job_of_a_chain(tmp_path: Path) -> None:
    result = run_job(tmp_path, fails="preflight", CHAIN_LINK="2")
    assert "the nodes are not fit (failure 1 in a row" in result.stdout
    assert result.returncode == 75
