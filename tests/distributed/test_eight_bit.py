"""8-bit AdamW under every way of cutting: it is bitsandbytes', it follows AdamW, and its checkpoints are AdamW's."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor

from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.builder import build_stage
from megatron_kosmos.engine.checkpointing import CheckpointStore
from megatron_kosmos.engine.stage import Stage
from megatron_kosmos.engine.train_step import StepRunner
from megatron_kosmos.optim.adamw import MOMENTS
from megatron_kosmos.optim.groups import KEEPS_32_BITS
from megatron_kosmos.parallel.topology import Topology, build_topology
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import frozen_vision, rank_batches, tiny_run
from tests.distributed.training import gather

pytestmark = pytest.mark.distributed

NUM_STEPS, SAVE_AT = 6, 3
WIDE = {  # matrices of 4096 elements and more on every rank, which smaller ones don't get 8 bits for
    "model__decoder__num_layers": 2,
    "model__decoder__width": 64,
    "model__decoder__ffn_width": 256,
    "model__vision__width": 64,
    "model__vision__ffn_width": 129,  # replicated matrices that do not fill their last block
    "model__decoder__positions": "learned",
    "optimizer__learning_rate": 5e-3,
    "optimizer__groups": [
        *frozen_vision(2),
        {"parameters": ["resampler.*"], "learning_rate_scale": 0.5, "weight_decay": 0.3},
    ],
}
EIGHT_BIT = WIDE | {"optimizer__kind": "adamw_8bit"}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2_zero0": (2, {"parallel__zero_stage": 0}),
    "dp2_zero2_bf16": (2, {"parallel__zero_stage": 2, "training__precision": "bf16"}),
    "dp3_zero3": (3, {"parallel__zero_stage": 3, "training__global_batch_size": 12}),
    "tp2_dp2_zero1_sp_bf16": (
        4,
        {"parallel__tensor_parallel_size": 2, "parallel__sequence_parallel": True, "training__precision": "bf16"},
    ),
    "tp2_pp2_tied": (
        4,
        {
            "parallel__tensor_parallel_size": 2,
            "parallel__pipeline_parallel_size": 2,
            "model__decoder__tie_embeddings": True,
        },
    ),
}


def start(run: RunConfig, root: Path) -> tuple[Stage, int, Topology, CheckpointStore]:
    topology = build_topology(run.parallel, torch.device("cpu"))
    store = CheckpointStore(root, topology, keep_last=1)
    return *build_stage(run, topology, store), topology, store


def train_rank(run: RunConfig, root: Path, stop: int, save_at: int | None, follow: bool) -> dict[str, Any]:
    """Continue from the newest checkpoint in `root` up to step `stop`; with `follow`, check each update."""
    stage, first, topology, store = start(run, root)
    check = follow_with_bitsandbytes(stage) if follow else None
    runner = StepRunner(run, stage, topology)
    pattern = "timm ittt" if topology.dp_size < 3 else "timmit itttmm"
    series = []
    for step in range(first, stop):
        result = runner.train(step, rank_batches(step % 2, pattern, topology))
        series.append((result.sums.mean, result.grad_norm))
        if step + 1 == save_at:
            store.save(save_at, stage, {"config": run.model_dump(mode="json")})
    if check is not None:
        check(stop - first)
    counts = bytes_by_dtype(stage) if run.optimizer.kind == "adamw_8bit" else {}
    return {"series": series, "state": whole_state(stage, topology), "bytes": counts}


def follow_with_bitsandbytes(stage: Stage) -> Callable[[int], None]:
    """Give every update's gradients to bitsandbytes' own classes as well, for each tensor that ZeRO updates alone.

    Return what raises unless their weights and moments are ours, after a number of updates.
    """
    adamw: Any = stage.optimizer.adamw
    alone: dict[Tensor, Any] = {}
    for flat, (group, _) in updated_tensors(stage).items():
        copy = torch.nn.Parameter(flat.detach().clone())
        bits = 32 if group[KEEPS_32_BITS] else 8
        settings = {"betas": tuple(group["betas"]), "eps": group["eps"], "weight_decay": group["weight_decay"]}
        alone[flat] = bitsandbytes.optim.AdamW([copy], **settings, optim_bits=bits, min_8bit_size=0)
    update, counts = adamw.step, dict.fromkeys(alone, 0)

    def update_both() -> None:
        for group in adamw.param_groups:
            for flat in group["params"]:
                other = alone[flat]
                other.param_groups[0]["lr"] = group["lr"]
                other.param_groups[0]["params"][0].grad = flat.grad.clone()
                other.step()
                counts[flat] += 1
        update()

    adamw.step = update_both

    def check(updates: int) -> None:
        assert set(counts.values()) == {updates}
        rate = max(group["lr"] for group in adamw.param_groups)
        assert {group["lr"] / rate for group in adamw.param_groups} <= {0.5, 1.0}
        assert {group["weight_decay"] for group in adamw.param_groups} == {0.0, 0.1, 0.3}
        for flat, other in alone.items():
            (copy,) = other.param_groups[0]["params"]
            assert torch.equal(flat, copy)
            for key, value in other.state[copy].items():
                assert torch.equal(torch.as_tensor(adamw.state[flat][key]), torch.as_tensor(value)), key

    return check


def updated_tensors(stage: Stage) -> dict[Tensor, tuple[dict[str, Any], dict[str, Any]]]:
    """What AdamW updates on this rank, with the group and the state of each."""
    optimizer = stage.optimizer
    if optimizer.stage < 3:
        flats = [(flat, group) for group in optimizer.adamw.param_groups for flat in group["params"]]
    else:
        flats = list(zip(optimizer.optimizer.fp32_partitioned_groups_flat, optimizer.adamw.param_groups, strict=True))
    return {flat: (group, optimizer.adamw.state[flat]) for flat, group in flats}


def whole_state(stage: Stage, topology: Topology) -> dict[str, dict[str, Tensor]]:
    """Master and moments of every trained parameter of this rank in fp32, gathered from the tensor ranks."""
    return {
        named.name: {
            key: gather(tensor, named.shard_dim, topology)
            for key, tensor in stage.optimizer.state.read(named.parameter).items()
        }
        for named in stage.named
        if named.parameter.requires_grad
    }


def bytes_by_dtype(stage: Stage) -> dict[str, int]:
    """Elements whose moments have 8 and 32 bits, and all bytes of the states without bitsandbytes' shared tables."""
    counts = {"elements_8": 0, "elements_32": 0, "bytes": 0}
    for flat, (group, state) in updated_tensors(stage).items():
        dtype = torch.float32 if group[KEEPS_32_BITS] else torch.uint8
        assert [state[key].dtype for key in ("state1", "state2")] == [dtype, dtype]
        counts["elements_32" if group[KEEPS_32_BITS] else "elements_8"] += flat.numel()
        counts["bytes"] += sum(
            value.nbytes for key, value in state.items() if isinstance(value, Tensor) and not key.startswith("qmap")
        )
    return counts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_update_is_that_of_bitsandbytes_and_a_resumed_run_goes_on_bit_for_bit(
    layout: str, tmp_path: Path
) -> None:
    world_size, changes = LAYOUTS[layout]
    run = tiny_run(**EIGHT_BIT, **changes)
    undisturbed = run_ranks(train_rank, world_size, run, tmp_path, NUM_STEPS, SAVE_AT, True)
    resumed = run_ranks(train_rank, world_size, run, tmp_path, NUM_STEPS, None, False)
    for before, after in zip(undisturbed, resumed, strict=True):
        assert len(before["series"]) == NUM_STEPS
        assert after["series"] == before["series"][SAVE_AT:]
        assert_same_state(after["state"], before["state"])
        counts = before["bytes"]
        scales = counts["elements_8"] / 256
        blocks_cut_short = 200
        expected = 2 * counts["elements_8"] + 8 * scales + 8 * counts["elements_32"]
        assert expected <= counts["bytes"] <= expected + 8 * blocks_cut_short
        assert counts["elements_8"] > 2 * counts["elements_32"]


def assert_same_state(one: dict[str, dict[str, Tensor]], other: dict[str, dict[str, Tensor]]) -> None:
    assert one.keys() == other.keys()
    for name, tensors in one.items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, other[name][key]), (name, key)


def test_its_checkpoints_are_adamws_and_fit_any_layout(tmp_path: Path) -> None:
    """8 bits under one layout, read under others with 8 and with 32 bits, and back."""
    eight_bit = tiny_run(**EIGHT_BIT, parallel__tensor_parallel_size=2)
    saved = run_ranks(train_rank, 4, eight_bit, tmp_path, SAVE_AT, SAVE_AT, False)
    plain = tiny_run(**WIDE, parallel__pipeline_parallel_size=2)
    as_adamw = merged(run_ranks(state_of_rank, 2, plain, tmp_path))
    assert_same_state(as_adamw, merged(result["state"] for result in saved))
    requantized = merged(run_ranks(state_of_rank, 2, tiny_run(**EIGHT_BIT, parallel__zero_stage=3), tmp_path))
    assert_within_a_quantum(requantized, as_adamw)
    continued = run_ranks(train_rank, 2, plain, tmp_path, SAVE_AT + 2, SAVE_AT + 2, False)
    back = merged(run_ranks(state_of_rank, 2, tiny_run(**EIGHT_BIT, parallel__zero_stage=2), tmp_path))
    assert_within_a_quantum(back, merged(result["state"] for result in continued))


def state_of_rank(run: RunConfig, root: Path) -> dict[str, dict[str, Tensor]]:
    """What the newest checkpoint in `root` gave this rank."""
    stage, _, topology, _ = start(run, root)
    assert stage.optimizer.state.updates > 0
    return whole_state(stage, topology)


def merged(states: Iterable[dict[str, dict[str, Tensor]]]) -> dict[str, dict[str, Tensor]]:
    return {name: tensors for state in states for name, tensors in state.items()}


def assert_within_a_quantum(state: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> None:
    """Masters are exact; moments are within half the widest gap of the 8-bit fractions, of what a block may hold."""
    assert state.keys() == expected.keys()
    largest = {key: max(float(tensors[key].abs().max()) for tensors in expected.values()) for key in MOMENTS}
    for name, tensors in state.items():
        assert torch.equal(tensors["master"], expected[name]["master"]), name
        for key in MOMENTS:
            bound = 0.0075 * (largest[key] if not name.startswith("embedding.") else 0.0)
            assert float((tensors[key] - expected[name][key]).abs().max()) <= bound, (name, key)


def test_losses_follow_those_of_adamw(tmp_path: Path) -> None:
    """Over 30 steps in which both learn two batches by heart."""
    plain, eight_bit = (
        [loss for loss, _ in run_ranks(train_rank, 1, run, tmp_path, 30, None, False)[0]["series"]]
        for run in (tiny_run(**changes, training__steps=30) for changes in (WIDE, EIGHT_BIT))
    )
    assert plain[0] > 5.0
    assert plain[-1] < 0.3
    assert eight_bit == pytest.approx(plain, abs=5e-3)  # 1.2e-3 measured
    assert eight_bit[-1] != plain[-1]
