"""What is chosen for which settings and libraries, what is refused and how; unfused attention is the plain one."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kosmos.batch import row_starts
from megatron_kosmos.config import ConfigError, RunConfig
from megatron_kosmos.engine.builder import build_chunks, build_stage, derive_transformer_config
from megatron_kosmos.engine.dry_run import plan
from megatron_kosmos.model import kernels
from megatron_kosmos.model.initialization import initialize
from megatron_kosmos.model.kernels import (
    LIBRARIES,
    PLAIN,
    Choice,
    Kernels,
    Obstacle,
    choose_kernels,
    import_obstacle,
    resolve,
)
from megatron_kosmos.model.names import named_parameters
from megatron_kosmos.parallel.randomness import seed_microbatch
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import LENGTH, MICRO, rank_batches, tiny_run

EVERYTHING = dict.fromkeys(LIBRARIES, Obstacle.NONE)
NO_CUDA = dict.fromkeys(LIBRARIES, Obstacle.NO_CUDA)
BF16: dict[str, Any] = {"training__precision": "bf16"}
CPU = torch.device("cpu")


def without(*choices: Choice) -> dict[Choice, Obstacle]:
    return EVERYTHING | dict.fromkeys(choices, Obstacle.ABSENT)


def test_auto_is_plain_where_nothing_is_there() -> None:
    absent = without(*LIBRARIES)
    for obstacles in (absent, NO_CUDA):
        assert resolve(tiny_run(**BF16), obstacles) == resolve(tiny_run(), obstacles) == PLAIN


@pytest.mark.parametrize(
    "changes, obstacles, expected",
    [
        (BF16, EVERYTHING, Kernels("flash", "apex", "torch", "apex")),
        (BF16, without(("layer_norm", "apex")), Kernels("flash", "te", "torch", "apex")),
        (BF16, without(("attention", "flash")), Kernels("sdpa", "apex", "torch", "apex")),
        (BF16 | {"kernels__attention": "unfused"}, EVERYTHING, Kernels("unfused", "apex", "apex", "apex")),
        (
            BF16 | {"kernels__attention": "unfused"},
            without(("softmax", "apex")),
            Kernels("unfused", "apex", "torch", "apex"),
        ),
        (BF16 | {"parallel__zero_stage": 2}, EVERYTHING, Kernels("flash", "apex", "torch", "torch")),
        ({}, EVERYTHING, Kernels("sdpa", "apex", "torch", "torch")),
        ({"kernels__attention": "unfused"}, EVERYTHING, Kernels("unfused", "apex", "torch", "torch")),
        (BF16 | {"kernels__layer_norm": "te"}, EVERYTHING, Kernels("flash", "te", "torch", "apex")),
        (
            BF16
            | {"kernels__attention": "sdpa", "kernels__layer_norm": "torch", "kernels__gradient_accumulation": "torch"},
            EVERYTHING,
            PLAIN,
        ),
    ],
)
def test_auto_takes_the_fastest_that_fits(
    changes: dict[str, Any], obstacles: dict[Choice, Obstacle], expected: Kernels
) -> None:
    assert resolve(tiny_run(**changes), obstacles) == expected


def test_heads_too_wide_for_flash_attention_take_the_plain_path() -> None:
    wide: dict[str, Any] = BF16 | {"model__decoder__width": 1040, "model__decoder__num_heads": 4}
    assert resolve(tiny_run(**wide), EVERYTHING).attention == "sdpa"
    with pytest.raises(ConfigError, match=r"kernels.attention=flash: .* up to 256, and width / num_heads = 260"):
        resolve(tiny_run(**wide, kernels__attention="flash"), EVERYTHING)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kernels__attention": "flash"}, r"kernels.attention=flash: flash-attn computes in bf16.*precision=fp32"),
        (
            BF16 | {"kernels__softmax": "apex"},
            r"kernels.softmax=apex: .*kernels.attention=unfused.* attention is flash",
        ),
        ({"kernels__softmax": "apex", "kernels__attention": "unfused"}, r"kernels.softmax=apex: .*precision=fp32"),
        ({"kernels__gradient_accumulation": "apex"}, r"kernels.gradient_accumulation=apex: .*precision=fp32"),
        (
            BF16 | {"kernels__gradient_accumulation": "apex", "parallel__zero_stage": 3},
            r"kernels.gradient_accumulation=apex: .*parallel.zero_stage=1 and not at 3",
        ),
    ],
)
def test_what_the_settings_exclude_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(tiny_run(**changes), EVERYTHING)


NAMED: dict[Choice, dict[str, Any]] = {
    ("attention", "flash"): BF16 | {"kernels__attention": "flash"},
    ("layer_norm", "apex"): {"kernels__layer_norm": "apex"},
    ("layer_norm", "te"): {"kernels__layer_norm": "te"},
    ("softmax", "apex"): BF16 | {"kernels__softmax": "apex", "kernels__attention": "unfused"},
    ("gradient_accumulation", "apex"): BF16 | {"kernels__gradient_accumulation": "apex"},
}


@pytest.mark.parametrize("choice", NAMED, ids="=".join)
def test_what_is_named_and_absent_is_refused_with_the_way_to_get_it(choice: Choice) -> None:
    command = {
        "flash": r"pip install --no-build-isolation -e '\.\[gpu\]'",
        "te": r"pip install --no-build-isolation -e '\.\[gpu\]'",
        "apex": r"--cpp_ext.*--cuda_ext.*git\+https://github.com/NVIDIA/apex",
    }[choice[1]]
    run = tiny_run(**NAMED[choice])
    resolve(run, EVERYTHING)
    for obstacle, reason in (
        (Obstacle.ABSENT, "not installed"),
        (Obstacle.DOES_NOT_LOAD, "does not load"),
        (Obstacle.NO_CUDA, "needs an NVIDIA GPU, and torch finds none"),
    ):
        with pytest.raises(ConfigError, match=f"kernels.{choice[0]}={choice[1]}: .*{reason}.*{command}"):
            resolve(run, EVERYTHING | {choice: obstacle})


def test_the_other_apex_is_told_from_nvidias() -> None:
    with pytest.raises(ConfigError, match="another package, the one of that name on PyPI: pip uninstall apex"):
        resolve(tiny_run(kernels__layer_norm="apex"), EVERYTHING | {("layer_norm", "apex"): Obstacle.OTHER_PACKAGE})


def test_an_old_gpu_is_refused() -> None:
    run = tiny_run(**NAMED["attention", "flash"])
    with pytest.raises(ConfigError, match=r"flash-attn needs a GPU of compute capability 8\.0"):
        resolve(run, EVERYTHING | {("attention", "flash"): Obstacle.OLD_GPU})


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that Python imports from before any other; what a test imports is forgotten after it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


NVIDIAS_APEX = {"apex/__init__.py": "", "apex/normalization/__init__.py": "", "apex/normalization/norm.py": ""}


@pytest.mark.parametrize(
    "files, modules, expected",
    [
        ({}, ("apex", "fused_sums"), Obstacle.ABSENT),
        ({"apex/__init__.py": "import pyramid_of_no_such_name"}, ("apex", "fused_sums"), Obstacle.OTHER_PACKAGE),
        ({"apex.py": ""}, ("apex", "fused_sums"), Obstacle.OTHER_PACKAGE),
        (NVIDIAS_APEX, ("apex", "fused_sums"), Obstacle.ABSENT),
        (NVIDIAS_APEX | {"fused_sums.py": ""}, ("apex.normalization.norm", "fused_sums"), Obstacle.NONE),
        (
            NVIDIAS_APEX | {"fused_sums.py": "raise ImportError('undefined symbol: _ZN3c10')"},
            ("apex", "fused_sums"),
            Obstacle.DOES_NOT_LOAD,
        ),
        ({"flashing/__init__.py": "import flashing_2_cuda"}, ("flashing",), Obstacle.DOES_NOT_LOAD),
        ({"flashing/__init__.py": "raise OSError('libcudart.so.13')"}, ("flashing",), Obstacle.DOES_NOT_LOAD),
    ],
)
def test_what_is_in_the_way_of_an_import(
    packages: Path, files: dict[str, str], modules: tuple[str, ...], expected: Obstacle
) -> None:
    write(packages, files)
    assert import_obstacle(modules) == expected


def error_of(run: RunConfig) -> str:
    """Return what a rank is told at start."""
    try:
        build_stage(run, build_topology(run.parallel, CPU))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.distributed
def test_every_rank_is_told_alike_at_start() -> None:
    run = tiny_run(**NAMED["gradient_accumulation", "apex"])
    first, second = run_ranks(error_of, 2, run)
    assert first == second
    assert "kernels.gradient_accumulation=apex: apex needs an NVIDIA GPU" in first


def chosen_with_one_rank_lacking_flash(run: RunConfig) -> Kernels:
    def obstacle(library: Any, device: torch.device) -> Obstacle:
        return Obstacle.ABSENT if library.name == "flash-attn" and dist.get_rank() == 1 else Obstacle.NONE

    kernels._obstacle = obstacle
    return choose_kernels(run, CPU)


@pytest.mark.distributed
def test_what_one_rank_lacks_none_uses() -> None:
    ranks = run_ranks(chosen_with_one_rank_lacking_flash, 2, tiny_run(**BF16))
    assert ranks == [Kernels("sdpa", "apex", "torch", "apex")] * 2


def test_what_was_chosen_fits_a_line() -> None:
    assert str(PLAIN) == "attention sdpa, layer norm torch, gradient accumulation torch"
    unfused = Kernels("unfused", "apex", "apex", "apex")
    assert str(unfused) == "attention unfused (apex softmax), layer norm apex, gradient accumulation apex"


def test_a_dry_run_needs_no_kernel() -> None:
    named = tiny_run(
        **BF16, kernels__attention="flash", kernels__layer_norm="te", kernels__gradient_accumulation="apex"
    )
    assert plan(named, 2).parts == plan(tiny_run(**BF16), 2).parts


def losses_and_gradients(
    run: RunConfig, attention: str, dtype: torch.dtype, segments: tuple[int, ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    topology = build_topology(run.parallel, CPU)
    transformer = derive_transformer_config(run, replace(PLAIN, attention=attention))
    transformer.params_dtype = dtype
    (chunk,) = build_chunks(run, transformer, topology)
    initialize(chunk, run.training.seed)
    seed_microbatch(run.training.seed, 0, 0, 0, topology)
    starts = torch.tensor(segments, dtype=torch.int32) if segments else row_starts(MICRO, LENGTH)
    (batch,) = rank_batches(0, "m", topology)
    losses = chunk(replace(batch, document_starts=starts))
    losses.total.backward()
    gradients = {one.name: one.parameter.grad for one in named_parameters(chunk) if one.parameter.grad is not None}
    return losses.each_BT, gradients


@pytest.mark.distributed
@pytest.mark.parametrize("segments", [(), (0, 9, 24, 30, 31, 48)], ids=["plain", "documents"])
@pytest.mark.parametrize("num_groups, tp_size", [(2, 1), (1, 2)])
def test_unfused_attention_is_the_plain_one(num_groups: int, tp_size: int, segments: tuple[int, ...]) -> None:
    run = tiny_run(model__decoder__num_query_groups=num_groups, parallel__tensor_parallel_size=tp_size)
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        plain = run_ranks(losses_and_gradients, tp_size, run, "sdpa", dtype, segments)
        unfused = run_ranks(losses_and_gradients, tp_size, run, "unfused", dtype, segments)
        for (losses, gradients), (expected_losses, expected) in zip(unfused, plain, strict=True):
            torch.testing.assert_close(losses, expected_losses, atol=0.0, rtol=1e-6)
            for name, gradient in expected.items():
                difference = (gradients[name] - gradient).norm().item()
                # A shift of all keys is nothing to softmax: that gradient is zero but for rounding.
                assert difference <= (1e-6 if name.endswith("k_proj.bias") else bound * gradient.norm().item()), name
