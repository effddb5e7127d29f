"""Training on CUDA is training on the CPU, whatever kernels it runs on."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
PLAIN: dict[str, Any] = {
    "kernels__attention": "sdpa",
    "kernels__layer_norm": "torch",
    "kernels__gradient_accumulation": "torch",
}
BF16: dict[str, Any] = {"training__precision": "bf16", "model__decoder__width": 64, "model__decoder__num_heads": 4}


@cache
def train(on_cuda: bool, settings: str) -> dict[str, Any]:
    hidden = {} if on_cuda else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    shown = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.gpu.first_steps", settings],
        cwd=Path(__file__).parents[2],
        env=shown | hidden | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    record: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert record["device"] == ("cuda" if on_cuda else "cpu")
    return record


def assert_same(changes: dict[str, Any], reference: dict[str, Any], bound: float) -> None:
    actual, expected = train(True, json.dumps(changes)), train(False, json.dumps(reference))
    for key in ("losses", "grad_norms"):
        assert actual[key] == pytest.approx(expected[key], rel=bound), key


@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
def test_fp32_on_cuda_is_the_cpu(documents: bool) -> None:
    assert_same({"documents": documents} | PLAIN, {"documents": documents}, 1e-4)


@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize(
    "kernels",
    [
        PLAIN,
        PLAIN | {"kernels__attention": "flash"},
        PLAIN | {"kernels__attention": "unfused", "kernels__softmax": "apex"},
        PLAIN | {"kernels__layer_norm": "apex"},
        PLAIN | {"kernels__layer_norm": "te"},
        PLAIN | {"kernels__gradient_accumulation": "apex"},
        {},
    ],
    ids=["plain", "flash", "unfused", "apex_norm", "te_norm", "apex_sums", "auto"],
)
def test_bf16_on_cuda_is_the_cpu(kernels: dict[str, Any], documents: bool) -> None:
    assert_same(BF16 | kernels | {"documents": documents}, BF16 | {"documents": documents}, 2e-2)


@pytest.mark.parametrize("attention", ["sdpa", "flash", "unfused"])
def test_recompute_replays_dropout(attention: str) -> None:
    dropout = BF16 | {
        "kernels__attention": attention,
        "model__decoder__dropout": 0.1,
        "model__decoder__attention_dropout": 0.1,
    }
    kept, recomputed = (train(True, json.dumps(dropout | {"training__recompute": how})) for how in ("none", "full"))
    assert kept["losses"][0] == recomputed["losses"][0]
    assert kept["grad_norms"][0] == pytest.approx(recomputed["grad_norms"][0], rel=1e-3)  # flash-attn adds in any order
    assert abs(kept["losses"][0] - train(True, json.dumps(BF16))["losses"][0]) > 1e-3


def test_eight_bit_adamw_on_cuda_is_the_cpu() -> None:
    """With matrices of 4,096 elements and more, which smaller ones don't get 8 bits for."""
    changes: dict[str, Any] = BF16 | {"optimizer__kind": "adamw_8bit", "model__decoder__ffn_width": 256}
    assert_same(changes, changes, 2e-2)


def add_a_product() -> None:
    import fused_weight_gradient_mlp_cuda

    generator = torch.Generator().manual_seed(1)
    inputs, grad_output = (
        torch.randn(512, width, generator=generator).to(CUDA, torch.bfloat16) for width in (192, 320)
    )
    start = torch.randn(320, 192, generator=generator).to(CUDA)
    sums = start.clone()
    fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(inputs, grad_output, sums)
    expected = start.double() + grad_output.double().t() @ inputs.double()
    assert ((sums - expected).norm() / expected.norm()).item() < 1e-4


def test_apex_adds_weight_gradients_in_fp32() -> None:
    """The kernel that tests/distributed/test_gradient_fusion.py stands in for."""
    run_ranks(add_a_product, 1)
