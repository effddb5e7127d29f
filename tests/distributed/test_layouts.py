"""Training is the same under every layout: every parameter's gradient, losses and norms, against one process."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.builder import build_stage
from megatron_kosmos.model.kosmos import KosmosModel
from megatron_kosmos.optim import finalization, zero
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import tiny_run
from tests.distributed.training import NUM_STEPS, TrainingRecord, train_in_ranks

pytestmark = pytest.mark.distributed

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor_parallel_size": 2}),
    "tp2_sp": (2, {"tensor_parallel_size": 2, "sequence_parallel": True}),
    "tp4": (4, {"tensor_parallel_size": 4}),
    "tp4_sp": (4, {"tensor_parallel_size": 4, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_parallel_size": 2}),
    "pp2_uneven": (2, {"pipeline_parallel_size": 2, "chunk_layers": [1, 3]}),
    "pp2_vpp2": (2, {"pipeline_parallel_size": 2, "virtual_pipeline_parallel_size": 2}),
    "tp2_pp2": (4, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
    "pp2_dp2": (4, {"pipeline_parallel_size": 2}),
    "pp2_dp2_zero0": (4, {"pipeline_parallel_size": 2, "zero_stage": 0}),
    "tp2_pp2_vpp2_sp": (
        4,
        {
            "tensor_parallel_size": 2,
            "pipeline_parallel_size": 2,
            "virtual_pipeline_parallel_size": 2,
            "sequence_parallel": True,
        },
    ),
    "tp2_pp2_dp2": (8, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
    "dp2_zero0": (2, {"zero_stage": 0}),
    "dp2_zero1": (2, {"zero_stage": 1}),
    "dp2_zero2": (2, {"zero_stage": 2}),
    "dp2_zero3": (2, {"zero_stage": 3}),
    "tp2_dp2_zero2": (4, {"tensor_parallel_size": 2, "zero_stage": 2}),
    "tp2_sp_dp2_zero3": (4, {"tensor_parallel_size": 2, "sequence_parallel": True, "zero_stage": 3}),
}


def train(layout: str, pattern: str = "timm", num_steps: int = NUM_STEPS, **changes: Any) -> TrainingRecord:
    world_size, parallel = LAYOUTS[layout]
    return train_in_ranks(
        world_size, pattern, num_steps, **{f"parallel__{key}": value for key, value in parallel.items()}, **changes
    )


@cache
def one_process(pattern: str = "timm", tied: bool = False) -> TrainingRecord:
    return train_in_ranks(1, pattern, model__decoder__tie_embeddings=tied, parallel__zero_stage=0)


def assert_same(record: TrainingRecord, reference: TrainingRecord) -> None:
    torch.testing.assert_close(
        torch.tensor(record.grad_norms),
        torch.tensor(reference.grad_norms),
        atol=2e-6,
        rtol=5e-7,
        msg=_named("grad norm"),
    )
    torch.testing.assert_close(
        torch.tensor(record.losses), torch.tensor(reference.losses), atol=2e-6, rtol=5e-7, msg=_named("loss")
    )
    assert record.gradients.keys() == reference.gradients.keys()
    for name, expected in reference.gradients.items():
        difference = (record.gradients[name] - expected).norm().item()
        bound = 1e-5 * expected.norm().item()
        if name.endswith(("k_proj.bias", "k_layernorm.bias")):
            # Softmax doesn't see a shift of all keys: without xPos the true gradient is zero, what is left is rounding.
            bound = max(bound, 5e-8 * max(1.0, reference.grad_norms[0]))
        assert difference <= bound, f"gradient of {name} differs by {difference:.2e}"


def _named(what: str) -> Callable[[str], str]:
    return lambda message: f"{what}: {message}"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_recomputed_training_is_the_same_under_every_layout(layout: str, tied: bool) -> None:
    """Without recompute: test_presets.py, which has tied and untied ones."""
    record = train(layout, model__decoder__tie_embeddings=tied, training__recompute="full")
    assert_same(record, one_process(tied=tied))


@pytest.mark.parametrize("layout", ["tp2_pp2", "tp2_sp_dp2_zero3"])
def test_grouped_queries_and_learned_positions_train_the_same(layout: str) -> None:
    """Two query groups, one a tensor rank; a table of positions longer than the sequence; no clipping."""
    changes: dict[str, Any] = {
        "model__decoder__num_query_groups": 2,
        "model__decoder__positions": "learned",
        "model__decoder__max_sequence_length": 40,
        "optimizer__clip_grad_norm": 0.0,
    }
    assert_same(train(layout, **changes), train_in_ranks(1, parallel__zero_stage=0, **changes))


SHARED_KEYS: dict[str, Any] = {
    "model__decoder__query_key_norm": True,
    "model__decoder__num_query_groups": 1,
    "num_steps": 3,  # with one key head Adam makes 1e-5 of a weight's last bit by the fifth, in one process too
}


@pytest.mark.parametrize("layout, num_query_groups", [("tp2_sp", 1), ("tp4_sp", 2)])
def test_tensor_ranks_that_share_normalized_keys_train_the_same(layout: str, num_query_groups: int) -> None:
    """Fused rows are then cut within heads, and each rank normalizes a copy of its key head."""
    changes = SHARED_KEYS | {"model__decoder__num_query_groups": num_query_groups}
    assert_same(train(layout, **changes), train_in_ranks(1, parallel__zero_stage=0, **changes))


@pytest.mark.parametrize("pattern", ["tttt", "iiii", "titi", "itti tttt"])
@pytest.mark.parametrize("layout", ["tp2_sp", "pp2_dp2", "dp2_zero1", "dp2_zero2", "dp2_zero3", "tp2_dp2_zero2"])
def test_any_mix_of_images_trains_the_same(layout: str, pattern: str) -> None:
    """Text alone, images alone, images on one data rank only ("titi" over two ranks), steps without any image."""
    assert_same(train(layout, pattern), one_process(pattern))


@pytest.mark.parametrize("layout", ["pp2_dp2", "dp2_zero0", "dp2_zero1", "dp2_zero2", "dp2_zero3"])
def test_a_step_without_targets_changes_nothing(layout: str) -> None:
    pattern = "emie eeee timm"
    record = train(layout, pattern)
    assert record.grad_norms[1] == 0.0
    assert_same(record, one_process(pattern))


def test_every_trained_parameter_gets_a_gradient() -> None:
    reference = one_process()
    silent = [name for name, gradient in reference.gradients.items() if gradient.norm() < 1e-7]
    assert silent
    assert all(name.endswith("k_proj.bias") for name in silent)
    assert not any(".encoder.layers.0." in name or "post_layernorm" in name for name in reference.gradients)


@pytest.mark.parametrize("layout", ["tp2_sp", "pp2_vpp2", "dp2_zero3"])
def test_recompute_replays_dropout(layout: str) -> None:
    dropout: dict[str, Any] = {"model__decoder__dropout": 0.1, "model__decoder__attention_dropout": 0.1}
    kept = train(layout, **dropout)
    recomputed = train(layout, **dropout, training__recompute="full")
    assert kept.losses == recomputed.losses
    assert kept.grad_norms == recomputed.grad_norms
    assert abs(kept.losses[0] - one_process().losses[0]) > 1e-3, "dropout was not applied"


@pytest.mark.parametrize("layout", ["tp2_pp2_vpp2_sp", "pp2_dp2", "dp2_zero2", "dp2_zero3"])
def test_bf16_follows_fp32(layout: str) -> None:
    record = train(layout, training__precision="bf16")
    torch.testing.assert_close(torch.tensor(record.losses), torch.tensor(one_process().losses), atol=2e-2, rtol=0.0)
    torch.testing.assert_close(
        torch.tensor(record.grad_norms), torch.tensor(one_process().grad_norms), atol=0.0, rtol=2e-2
    )


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_position_tables_stay_fp32_beside_bf16_weights(zero_stage: int) -> None:
    """At T = 2048 bf16 tables are half wrong; DeepSpeed 0.19.0 still cast every buffer."""
    run = tiny_run(training__precision="bf16", parallel__zero_stage=zero_stage, model__decoder__positions="sinusoidal")
    ((tables, weights),) = run_ranks(dtypes_of_stage, 1, run)
    names = ("query_cos", "query_sin", "key_cos", "key_sin", "table")
    assert (tables, weights) == (dict.fromkeys(names, torch.float32), {torch.bfloat16})


def dtypes_of_stage(run: RunConfig) -> tuple[dict[str, torch.dtype], set[torch.dtype]]:
    stage, _ = build_stage(run, build_topology(run.parallel, torch.device("cpu")))
    buffers = (named for chunk in stage.chunks for named in chunk.named_buffers())
    tables = {name.rpartition(".")[2]: buffer.dtype for name, buffer in buffers if buffer.is_floating_point()}
    return tables, {parameter.dtype for chunk in stage.chunks for parameter in chunk.parameters()}


# Negative controls: without each class of gradient finalization the comparison above fails, and for that reason.


def test_control_sequence_parallel_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        finalization, "needs_tensor_parallel_sum", lambda p: bool(getattr(p, "sees_image_shard", False))
    )
    with pytest.raises(AssertionError, match="grad norm"):
        assert_same(train("tp2_sp"), one_process())


def test_control_image_shard_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        finalization, "needs_tensor_parallel_sum", lambda p: bool(getattr(p, "sequence_parallel", False))
    )
    with pytest.raises(AssertionError, match="grad norm"):
        assert_same(train("tp2_sp"), one_process())


def test_control_head_shard_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        finalization,
        "needs_tensor_parallel_sum",
        lambda p: bool(getattr(p, "sequence_parallel", False) or getattr(p, "sees_image_shard", False)),
    )
    with pytest.raises(AssertionError, match="grad norm"):
        assert_same(train("tp2_sp", **SHARED_KEYS), train_in_ranks(1, parallel__zero_stage=0, **SHARED_KEYS))


def test_control_tied_embedding_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero, "sum_tied_embedding", lambda *_: None)
    with pytest.raises(AssertionError, match="grad norm"):
        assert_same(train("pp2", model__decoder__tie_embeddings=True), one_process(tied=True))


def test_control_tied_copy_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _after_construction(monkeypatch, lambda _, parameter: _forget(parameter, "ds_pipe_replicated"))
    with pytest.raises(AssertionError, match="grad norm"):
        assert_same(train("pp2", model__decoder__tie_embeddings=True), one_process(tied=True))


def test_control_sharded_norm_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget_sub_layer_norm(name: str, parameter: nn.Parameter) -> None:
        if "linear_proj.norm" in name or "linear_fc2.norm" in name:
            _forget(parameter, "tensor_model_parallel")

    _after_construction(monkeypatch, forget_sub_layer_norm)
    with pytest.raises(AssertionError, match="grad norm"):
        assert_same(train("tp2"), one_process())


def _after_construction(monkeypatch: pytest.MonkeyPatch, change: Callable[[str, nn.Parameter], None]) -> None:
    construct = KosmosModel.__init__

    def construct_and_change(self: KosmosModel, *args: Any) -> None:
        construct(self, *args)
        for name, parameter in self.named_parameters():
            change(name, parameter)

    monkeypatch.setattr(KosmosModel, "__init__", construct_and_change)


def _forget(parameter: nn.Parameter, attribute: str) -> None:
    if hasattr(parameter, attribute):
        delattr(parameter, attribute)
