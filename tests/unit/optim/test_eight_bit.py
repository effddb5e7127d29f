"""8-bit moments against bitsandbytes: what it leaves behind comes back bit for bit, whole and in parts."""

import sys
from collections.abc import Iterator
from pathlib import Path

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import create_dynamic_map, quantize_blockwise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from megatron_kosmos.config import ConfigError, OptimizerConfig
from megatron_kosmos.engine.preflight import check_before_start
from megatron_kosmos.optim.adamw import MOMENTS, build_adamw, moments_of
from megatron_kosmos.optim.eight_bit import BLOCK, AdamW8bit, EightBitMoments, dequantize, quantize
from megatron_kosmos.optim.groups import KEEPS_32_BITS
from tests.distributed.tiny import tiny_run

SIGNED, UNSIGNED = create_dynamic_map(signed=True), create_dynamic_map(signed=False)
LENGTHS = (BLOCK * 400, BLOCK * 3 + 17, 5)


def trained(length: int, num_steps: int = 8, bits: int = 8) -> tuple[AdamW8bit, nn.Parameter]:
    """An AdamW8bit that has updated `length` weights with gradients over many orders of magnitude, some of them 0."""
    generator = torch.Generator().manual_seed(length)
    parameter = nn.Parameter(torch.randn(length, generator=generator))
    adamw = AdamW8bit([{"params": [parameter], KEEPS_32_BITS: bits == 32}], lr=1e-2, betas=(0.9, 0.98))
    scales = torch.exp(3 * torch.randn(length, generator=generator))
    scales[: length // 5] = 0.0
    for _ in range(num_steps):
        parameter.grad = scales * torch.randn(length, generator=generator)
        adamw.step()
    return adamw, parameter


def moments_left_by_bitsandbytes() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for length in LENGTHS:
        adamw, parameter = trained(length)
        state = adamw.state[parameter]
        for number, fractions in (("1", SIGNED), ("2", UNSIGNED)):
            assert torch.equal(state[f"qmap{number}"], fractions)
            yield state[f"state{number}"], state[f"absmax{number}"], fractions


def test_what_bitsandbytes_left_comes_back_bit_for_bit() -> None:
    lost = 0
    for codes, scales, fractions in moments_left_by_bitsandbytes():
        values = dequantize(codes, scales, fractions)
        again, scales_again = quantize(values, fractions)
        assert torch.equal(dequantize(again, scales_again, fractions), values)
        assert torch.equal(scales_again, scales)
        nonzero = values != 0
        assert torch.equal(again[nonzero], codes[nonzero])
        plain, state = quantize_blockwise(values, code=fractions, blocksize=BLOCK)
        lost += int((dequantize(plain, state.absmax, fractions) != values).sum())
    assert lost > 0.3 * sum(LENGTHS)  # bitsandbytes' own function would not have done


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), exponent=st.integers(-30, 30), blocks=st.integers(1, 8), signed=st.booleans())
def test_codes_of_any_scale_come_back(seed: int, exponent: int, blocks: int, signed: bool) -> None:
    """Blocks as an update may leave them: the largest magnitude has the code of 1, or the lowest of the signed ones."""
    generator = torch.Generator().manual_seed(seed)
    fractions = SIGNED if signed else UNSIGNED
    codes = torch.randint(0, 256, (blocks, BLOCK), generator=generator, dtype=torch.uint8)
    ends = torch.tensor([0, 255] if signed else [255], dtype=torch.uint8)
    codes[codes == 255] = 254
    codes[:, 7] = ends[torch.randint(len(ends), (blocks,), generator=generator)]
    scales = (1 + torch.rand(blocks, generator=generator)) * 10.0**exponent
    values = dequantize(codes.view(-1), scales, fractions)
    again, scales_again = quantize(values, fractions)
    assert torch.equal(dequantize(again, scales_again, fractions), values)
    assert torch.equal(again, codes.view(-1))


@pytest.mark.parametrize("fractions", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
def test_other_values_get_the_nearest_fraction_and_the_largest_stays(fractions: Tensor) -> None:
    values = torch.randn(BLOCK * 20 + 3, generator=torch.Generator().manual_seed(1))
    values = values if fractions[0] < 0 else values.square()
    codes, scales = quantize(values, fractions)
    scale_of_each = scales.repeat_interleave(BLOCK)[: values.numel()]
    nearest = (values / scale_of_each)[:, None].sub(fractions).abs().amin(1)
    found = (values / scale_of_each).sub(fractions[codes.int()]).abs()
    torch.testing.assert_close(found, nearest, rtol=0, atol=1e-7)
    stored = dequantize(codes, scales, fractions)
    for block, values_of_block in zip(stored.split(BLOCK), values.split(BLOCK), strict=True):
        largest = values_of_block.abs().argmax()
        torch.testing.assert_close(block[largest], values_of_block[largest], rtol=1.2e-7, atol=0)


LEFT = {length: (EightBitMoments(adamw), parameter) for length in LENGTHS for adamw, parameter in [trained(length)]}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_part_is_read_as_the_whole_is(data: st.DataObject) -> None:
    length = data.draw(st.sampled_from(LENGTHS))
    start = data.draw(st.integers(0, length - 1))
    end = data.draw(st.integers(start + 1, length))
    moments, parameter = LEFT[length]
    for name in MOMENTS:
        whole = moments.read(parameter, name, 0, length)
        assert torch.equal(moments.read(parameter, name, start, end - start), whole[start:end])


@pytest.mark.parametrize("bits", [8, 32])
def test_what_is_not_changed_stays(bits: int) -> None:
    adamw, parameter = trained(BLOCK * 8, bits=bits)
    moments = moments_of(adamw)
    before = {name: moments.read(parameter, name, 0, parameter.numel()).clone() for name in MOMENTS}
    for name in MOMENTS:
        with moments.opened(parameter, name) as values:
            values[: 2 * BLOCK] = 3.0
        after = moments.read(parameter, name, 0, parameter.numel())
        assert torch.equal(after[: 2 * BLOCK], torch.full((2 * BLOCK,), 3.0))
        assert torch.equal(after[2 * BLOCK :], before[name][2 * BLOCK :])


@pytest.mark.parametrize("bits", [8, 32])
def test_moments_made_beforehand_change_nothing(bits: int) -> None:
    """Against bitsandbytes' own classes, which make them at the first step; decay is decoupled."""
    start, gradient = torch.randn(2, 5000, generator=torch.Generator().manual_seed(3))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    group = {"params": [ours], "weight_decay": 0.3, KEEPS_32_BITS: bits == 32}
    adamw = build_adamw([group], OptimizerConfig(kind="adamw_8bit", learning_rate=1e-2))
    moments_of(adamw).create(ours, adamw.param_groups[0])
    settings_of_theirs = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.3}
    alone = bitsandbytes.optim.AdamW([theirs], **settings_of_theirs, optim_bits=bits)
    for _ in range(3):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        adamw.step()
        alone.step()
    assert torch.equal(ours, theirs)
    dtype = {8: torch.uint8, 32: torch.float32}[bits]
    assert [adamw.state[ours][key].dtype for key in ("state1", "state2")] == [dtype, dtype]
    assert moments_of(adamw).updates(ours) == 3


def test_updates_are_counted_from_where_they_are_set() -> None:
    adamw, parameter = trained(300, num_steps=2)
    moments = moments_of(adamw)
    assert moments.updates(parameter) == 2
    moments.set_updates(parameter, 40)
    adamw.step()
    assert moments.updates(parameter) == 41


@pytest.mark.parametrize("found", [None, "0.45.5"])
def test_without_bitsandbytes_it_says_how_to_install_it(
    found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if found is not None:
        folder = tmp_path / f"bitsandbytes-{found}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: bitsandbytes\nVersion: {found}\n")
    group = {"params": [nn.Parameter(torch.zeros(3))], "weight_decay": 0.0, KEEPS_32_BITS: False}
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match=rf"this Python has {found or 'none'}: pip install .*\[eight-bit\]"):
        build_adamw([group], OptimizerConfig(kind="adamw_8bit", learning_rate=1e-2))
    with pytest.raises(ConfigError, match=r"optimizer\.kind=adamw_8bit needs bitsandbytes >= 0\.50"):
        check_before_start(tiny_run(optimizer__kind="adamw_8bit"), world_size=1)
    build_adamw([group], OptimizerConfig(learning_rate=1e-2))
