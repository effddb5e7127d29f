"""The plan of a run: sizes against the paper's and Kosmos-X's counts, stages against what training builds."""

import io
import math
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from megatron_kosmos.config import ConfigError, RunConfig, load_config
from megatron_kosmos.engine.builder import build_chunks, derive_transformer_config
from megatron_kosmos.engine.dry_run import PartSize, Plan, plan, render
from megatron_kosmos.engine.memory import RankMemory, rank_memory
from megatron_kosmos.engine.trainable import PARTS
from megatron_kosmos.model.names import named_parameters
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import VOCAB, tiny_run

CONFIGS = Path(__file__).parents[3] / "configs"
TP2_PP2 = {"parallel__tensor_parallel_size": 2, "parallel__pipeline_parallel_size": 2}
PP2_VPP2 = {"parallel__pipeline_parallel_size": 2, "parallel__virtual_pipeline_parallel_size": 2}

KOSMOS_X_DECODER = 1_344_368_640
"""torchscale's decoder in the README of Kosmos-X: both vocabulary matrices and the positions included."""
KOSMOS_X_TOTAL = 1_670_959_104
CLIP_VIT_L = 303_179_776
CLIP_LAYER = 12_596_224
SEED_PERCEIVER = 21_313_536
UNREACHED_FRAMES = 255 * 1024
"""flamingo-pytorch's embeddings of further frames: an image has one."""
PROJECTION = 2_097_152


def preset(name: str, *overrides: str) -> RunConfig:
    return load_config(CONFIGS / f"{name}.yaml", overrides)


def total(plan: Plan) -> int:
    return sum(size.total for size in plan.parts.values())


def test_kosmos_x_is_the_seed_model_but_for_padding_and_frames_that_no_image_reaches() -> None:
    run = preset("kosmos_x")
    planned = plan(run, 64)
    padding = 2 * (run.model.decoder.padded_vocab_size - 32_002) * 2048
    decoder = sum(planned.parts[part].total for part in ("embedding", "decoder", "output"))
    assert decoder - padding == KOSMOS_X_DECODER
    assert planned.parts["vision"].total == CLIP_VIT_L
    assert planned.parts["resampler"].total == SEED_PERCEIVER - UNREACHED_FRAMES + PROJECTION
    assert total(planned) - padding == KOSMOS_X_TOTAL - UNREACHED_FRAMES
    assert planned.parts["vision"].frozen == 2 * 1024  # post_layernorm, which last_hidden_state does not reach


def test_kosmos1_has_the_paper_s_sizes() -> None:
    planned = plan(preset("kosmos1"), 64)
    parts = planned.parts
    assert parts["vision"] == PartSize(trained=CLIP_LAYER, frozen=CLIP_VIT_L - CLIP_LAYER)
    assert parts["decoder"].total == KOSMOS_X_DECODER - 2 * 32_002 * 2048 - 2048 * 2048
    assert parts["embedding"].total == math.ceil(64_007 / 1024) * 1024 * 2048
    assert parts["output"].total == 0
    decoder_only = parts["embedding"].total + parts["decoder"].total
    assert decoder_only == pytest.approx(1.3e9, rel=0.05)
    assert total(planned) == pytest.approx(1.6e9, rel=0.05)


def test_kosmos1_takes_the_paper_s_steps() -> None:
    planned = plan(preset("kosmos1"), 64)
    assert (planned.dp_size, planned.num_microbatches) == (16, 18)
    assert planned.tokens_per_step == 576 * 2048 == pytest.approx(1.2e6, rel=0.02)
    assert planned.total_tokens == 300_000 * planned.tokens_per_step


@pytest.mark.parametrize("data_ranks, micro_batch_size", [(1, 2), (2, 2), (4, 2), (8, 2), (16, 2), (32, 2), (64, 3)])
def test_kosmos1_s_batch_fits_powers_of_two(data_ranks: int, micro_batch_size: int) -> None:
    run = preset("kosmos1", f"training.micro_batch_size={micro_batch_size}")
    assert run.num_microbatches(4 * data_ranks) * micro_batch_size * data_ranks == 576


def test_stages_of_kosmos1_are_even_in_training_work() -> None:
    planned = plan(preset("kosmos1"), 64)
    assert [stage.num_layers for stage in planned.stages] == [12, 12]
    shares = [stage.training_share for stage in planned.stages]
    assert sum(shares) == pytest.approx(1)
    assert max(shares) < 0.51
    assert planned.stages[0].forward_share > 0.55  # the frozen tower has no backward pass


def test_a_big_plan_takes_no_memory() -> None:
    """64 x 24 layers in bf16 would be 3.3 GB a copy; the meta device takes none of it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan(preset("kosmos1", "parallel.pipeline_parallel_size=8", "training.global_batch_size=512"), 1024)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def what_a_rank_builds(run: RunConfig) -> tuple[int, int, int, RankMemory]:
    topology = build_topology(run.parallel, torch.device("cpu"))
    chunks = build_chunks(run, derive_transformer_config(run), topology)
    parameters = [named for chunk in chunks for named in named_parameters(chunk)]
    num_layers = sum(chunk.chunk.num_layers for chunk in chunks)
    memory = rank_memory(parameters, run, topology.dp_size)
    return topology.pp_rank, num_layers, sum(named.parameter.numel() for named in parameters), memory


@pytest.mark.distributed
@pytest.mark.parametrize(
    "world_size, changes",
    [
        (4, TP2_PP2),
        (4, TP2_PP2 | {"model__decoder__tie_embeddings": True, "training__precision": "bf16"}),
        (4, PP2_VPP2 | {"model__decoder__positions": "learned"}),
        (2, {"parallel__zero_stage": 3}),
    ],
)
def test_the_plan_is_what_ranks_build(world_size: int, changes: dict[str, Any]) -> None:
    run = tiny_run(**changes)
    planned = plan(run, world_size)
    ranks = run_ranks(what_a_rank_builds, world_size, run)
    assert {rank[0] for rank in ranks} == set(range(len(planned.stages)))
    for pp_rank, num_layers, num_parameters, memory in ranks:
        stage = planned.stages[pp_rank]
        assert (stage.num_layers, stage.memory) == (num_layers, memory)
        on_all_tensor_ranks = sum(size.total for size in stage.parts.values())
        assert num_parameters <= on_all_tensor_ranks <= num_parameters * run.parallel.tensor_parallel_size


def test_a_tied_copy_is_held_by_the_last_stage_and_counted_once() -> None:
    run = tiny_run(model__decoder__tie_embeddings=True, parallel__pipeline_parallel_size=2)
    matrix = run.model.decoder.padded_vocab_size * run.model.decoder.width
    planned, whole = plan(run, 2), plan(tiny_run(model__decoder__tie_embeddings=True), 1)
    assert planned.stages[1].parts["output"] == PartSize(trained=matrix)
    assert planned.parts == whole.parts
    assert planned.parts["output"] == PartSize()
    assert sum(size.total for stage in planned.stages for size in stage.parts.values()) == total(planned) + matrix


def test_parts_do_not_depend_on_the_layout() -> None:
    whole = plan(tiny_run(), 1)
    assert list(whole.parts) == list(PARTS)
    for world_size, changes in ((2, {"parallel__tensor_parallel_size": 2}), (4, TP2_PP2), (2, PP2_VPP2)):
        planned = plan(tiny_run(**changes), world_size)
        assert planned.parts == whole.parts
        assert sum(stage.forward_share for stage in planned.stages) == pytest.approx(1)


@pytest.mark.parametrize(
    "world_size, message",
    [(6, "6 processes cannot be cut into .* start a multiple of 4"), (12, "global_batch_size=8 is")],
)
def test_ranks_that_do_not_fit_are_refused(world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(tiny_run(**TP2_PP2), world_size)
    assert not dist.is_initialized()


def plan_inside(run: RunConfig) -> str:
    with pytest.raises(RuntimeError) as error:
        plan(run, 1)
    assert dist.is_initialized(), "the plan ended a process group that is not its own"
    return str(error.value)


@pytest.mark.distributed
def test_a_plan_inside_a_process_group_is_refused() -> None:
    assert "outside of a process group" in run_ranks(plan_inside, 1, tiny_run())[0]


def test_a_plan_leaves_no_process_group_behind() -> None:
    plan(tiny_run(), 1)
    assert not dist.is_initialized()


def rendered(planned: Plan, width: int = 80) -> list[str]:
    output = io.StringIO()
    render(planned, Console(file=output, width=width))
    return output.getvalue().splitlines()


def test_the_plan_reads_well_on_a_narrow_terminal() -> None:
    lines = rendered(plan(preset("kosmos1"), 64))
    text = "\n".join(lines)
    assert "…" not in text
    assert max(map(len, lines)) <= 80
    assert "2 tensor x 2 pipeline x 16 data, sequence parallel, ZeRO 1" in text
    assert "576 sequences = 18 microbatches x 2 sequences x 16 data ranks" in text
    assert "1,179,648 a step, 353,894,400,000 in 300,000 steps" in text
    assert "weights 2 N, gradients 4 T, optimizer 12 T / 16" in text
    assert [line.split()[1] for line in lines if line.startswith((" 0 ", " 1 "))] == ["0-11", "12-23", "1.39", "736.82"]


def test_chunks_of_the_interleaved_schedule_are_listed() -> None:
    text = "\n".join(rendered(plan(tiny_run(**PP2_VPP2), 2)))
    assert "2 chunks a stage" in text
    assert " 0       0 2 " in text
    assert " 1       1 3 " in text
    assert f"with {96 - VOCAB} rows of padding" in text


@pytest.mark.parametrize("name, world_size", [("kosmos_tiny", 1), ("kosmos1", 64), ("kosmos_x", 64)])
def test_the_documented_counts_are_those_of_the_plan(name: str, world_size: int) -> None:
    documented = (CONFIGS.parent / "docs" / "models.md").read_text()
    planned = plan(preset(name), world_size)
    decoder = sum(planned.parts[part].total for part in ("embedding", "decoder", "output"))
    (row,) = [line for line in documented.splitlines() if line.startswith(f"| `configs/{name}.yaml`")]
    assert row.endswith(f"| {total(planned):,} | {decoder:,} |")
    if name != "kosmos_tiny":
        for count in (planned.parts["decoder"].total, planned.parts["vision"].total, planned.parts["vision"].frozen):
            assert f"{count:,}" in documented
