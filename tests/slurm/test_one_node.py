"""The scripts for one machine: training, here and as a job, and the export of what came of it."""

from pathlib import Path

import pytest

from tests.slurm.runs import Run

pytestmark = [pytest.mark.slurm, pytest.mark.nightly, pytest.mark.timeout(3600)]


def test_training_and_export_on_one_node(run: Run, tmp_path: Path) -> None:
    variables = {
        "GPUS_PER_NODE": "2",
        "CONFIG": f"configs/kosmos_tiny.yaml {run.data.config}",
        "RUN_DIR": str(run.folder),
        "OVERRIDES": "parallel.pipeline_parallel_size=1 training.steps=3",
        "PREFLIGHT": "0",
    }
    run.cluster.call("bash", "launch/pretrain_kosmos_8gpu.sh", environment=variables)
    assert len(run.series()) == 3
    told = run.cluster.call(
        "bash", "launch/pretrain_kosmos_8gpu.sh", "training.steps=5", environment=variables | {"SUBMIT": "1"}
    )
    assert run.cluster.job(told.split()[1]).finish() == "COMPLETED"
    assert [step for step, *_ in run.series()] == [1, 2, 3, 4, 5]
    exported = tmp_path / "exported"
    job = {"SUBMIT": "1", "CPUS": "1", "MEMORY": "2G", "TIME": "00:30:00"}
    told = run.cluster.call("bash", "launch/convert_to_hf.sh", str(exported), environment=variables | job)
    assert run.cluster.job(told.strip()).finish() == "COMPLETED"
    assert (exported / "model.safetensors").exists()
