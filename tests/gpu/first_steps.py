"""Trains the tiny model for a few steps on whatever device torch finds, and prints losses and norms as JSON.

`python -m tests.gpu.first_steps '{"training__precision": "bf16"}'`. It is a program of its own, since a process decides
once whether there is CUDA.
"""

import json
import sys
from typing import Any

from megatron_kosmos.engine.builder import build_stage
from megatron_kosmos.engine.train_step import StepRunner
from megatron_kosmos.parallel.topology import build_topology, start_process_group, stop_process_group
from tests.distributed.test_documents import packed_step
from tests.distributed.tiny import step_batches, tiny_run

NUM_STEPS = 2


def train(changes: dict[str, Any], documents: bool) -> dict[str, Any]:
    """Train in this process alone."""
    run = tiny_run(**changes)
    device = start_process_group(rank=0, world_size=1, local_rank=0)
    topology = build_topology(run.parallel, device)
    stage, _ = build_stage(run, topology)
    runner = StepRunner(run, stage, topology)
    batches = [packed_step() if documents else step_batches(step, "timm") for step in range(NUM_STEPS)]
    results = [runner.train(step, batch) for step, batch in enumerate(batches)]
    stop_process_group()
    return {
        "device": device.type,
        "losses": [result.sums.mean for result in results],
        "grad_norms": [result.grad_norm for result in results],
    }


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    print(json.dumps(train(settings, documents=settings.pop("documents", False))))
