"""Training without CUDA: megatron-core sees its stand-in everywhere, and nothing else notices."""

import importlib
import inspect
import sys
from typing import Any

import pytest
import torch

from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.builder import build_stage
from megatron_kosmos.engine.train_step import StepRunner
from megatron_kosmos.parallel.cpu_backend import install_cpu_backend, unpatched_modules
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import rank_batches, tiny_run

pytestmark = pytest.mark.distributed

FACTORIES = ("zeros", "ones", "empty", "tensor", "full", "arange", "rand", "randn")
CUDA_CALLS = ("current_device", "synchronize", "manual_seed", "get_rng_state", "is_available")
PATCHED = "megatron.core.tensor_parallel.layers"
LATE_MODULE = "megatron.core.models.bert.bert_lm_head"
LAYOUTS: dict[str, dict[str, Any]] = {
    "pp2_vpp2": {"parallel__pipeline_parallel_size": 2, "parallel__virtual_pipeline_parallel_size": 2},
    "tp2_sp_recompute": {
        "parallel__tensor_parallel_size": 2,
        "parallel__sequence_parallel": True,
        "training__recompute": "full",
    },
}


def real_torch() -> dict[str, Any]:
    """What the stand-in replaces inside megatron-core, as everyone else sees it."""
    return {
        "module": sys.modules["torch"],
        "cuda": torch.cuda,
        **{name: getattr(torch, name) for name in FACTORIES},
        **{f"cuda.{name}": getattr(torch.cuda, name) for name in CUDA_CALLS},
    }


def modules_after_training(run: RunConfig) -> tuple[list[str], list[str], list[str]]:
    """Return megatron-core's modules that escaped the stand-in, what changed in torch, and who else got it."""
    before = real_torch()
    topology = build_topology(run.parallel, torch.device("cpu"))
    stage, _ = build_stage(run, topology)
    result = StepRunner(run, stage, topology).train(0, rank_batches(0, "timm", topology))
    assert result.grad_norm > 0
    after = real_torch()
    changed = [name for name, thing in before.items() if after[name] is not thing]
    stand_in = sys.modules[PATCHED].torch
    others = [
        name
        for name, module in list(sys.modules.items())
        if not name.startswith("megatron.core") and any(thing is stand_in for thing in list(vars(module).values()))
    ]
    return unpatched_modules(), changed, others


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_module_of_megatron_is_missed_and_nothing_else_is_touched(layout: str) -> None:
    for unpatched, changed, others in run_ranks(modules_after_training, 2, tiny_run(**LAYOUTS[layout])):
        assert (unpatched, changed, others) == ([], [], [])


def import_late() -> tuple[bool, bool]:
    """Import a module of megatron-core that nothing has loaded yet."""
    was_loaded = LATE_MODULE in sys.modules
    module = importlib.import_module(LATE_MODULE)
    return was_loaded, module.torch is torch


def test_a_module_imported_later_gets_the_stand_in() -> None:
    was_loaded, sees_real_torch = run_ranks(import_late, 1)[0]
    assert not was_loaded
    assert not sees_real_torch


def forget_one() -> list[str]:
    """Undo the patch of one module, as if it had been missed."""
    module = sys.modules[PATCHED]
    vars(module)["torch"] = torch
    return unpatched_modules()


def test_control_a_missed_module_is_found() -> None:
    assert run_ranks(forget_one, 1)[0] == [PATCHED]


def use_stand_in() -> None:
    seen_by_megatron = sys.modules[PATCHED].torch
    assert seen_by_megatron.cuda.current_device() == torch.device("cpu")
    assert seen_by_megatron.zeros(2, device="cuda").device.type == "cpu"
    assert seen_by_megatron.zeros(2, device=torch.device("cuda", 1)).device.type == "cpu"
    assert seen_by_megatron.zeros(2, device="meta").device.type == "meta"
    assert seen_by_megatron.nn is torch.nn
    assert seen_by_megatron.Tensor is torch.Tensor
    assert not seen_by_megatron.cuda.is_available()
    num_finders = len(sys.meta_path)
    install_cpu_backend()
    assert len(sys.meta_path) == num_finders, "installed twice"
    assert inspect.ismodule(seen_by_megatron)


def test_the_stand_in_is_torch_with_cuda_on_the_cpu() -> None:
    run_ranks(use_stand_in, 1)
