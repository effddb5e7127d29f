"""Runs with a checkpoint of random weights, written by the real checkpoint code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_kosmos.checkpoint.mesh import CheckpointMesh
from megatron_kosmos.checkpoint.save import save_checkpoint
from megatron_kosmos.checkpoint.tensors import TensorShard
from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.verify_conversion import training_model
from megatron_kosmos.model.names import named_parameters
from tests.distributed.tiny import tiny_run

STEP = 7


def trained_run(
    run_dir: Path, tokenizer: Path, change: Callable[[dict[str, Tensor]], None] | None = None, **changes: Any
) -> RunConfig:
    """Write a run's folder with one checkpoint and metrics; `change` may edit the weights before they are saved.

    Every weight differs from its fresh value, norms and the padding of the vocabulary included.
    """
    settings = {"model__decoder__vocab_size": 347, "model__decoder__max_sequence_length": 300} | changes
    run = tiny_run(run_dir=str(run_dir), data__tokenizer=str(tokenizer), **settings)
    generator = torch.Generator().manual_seed(3)
    with training_model(run) as (model, _):
        weights = {named.name: torch.empty(named.parameter.shape) for named in named_parameters(model)}
    for name, tensor in weights.items():
        is_scale = tensor.dim() == 1 and name.endswith("weight") and "norm" in name
        is_input = name.endswith(("word_embeddings.weight", "resampler.projection.weight"))
        tensor.normal_(mean=0.8 if is_scale else 0.0, std=0.5 if is_input else 0.2, generator=generator)
    if change is not None:
        change(weights)
    shards = [TensorShard(f"model/{name}", tensor, None) for name, tensor in weights.items()]
    shards.append(TensorShard("optimizer/exp_avg/decoder.final_layernorm.weight", torch.ones(32), None))
    state = {"config": run.model_dump(mode="json")}
    save_checkpoint(run_dir / "checkpoints", STEP, shards, state, CheckpointMesh(), keep_last=2)
    (run_dir / "metrics.jsonl").write_text(
        '{"step": 6, "loss": 3.5, "heldout_loss_text": 3.25}\n{"step": 7, "loss": 3.125}\n{"step": 8, "loss": 0.5}\n'
    )
    return run
