"""xPos around one fixed centre gives the scores of torchscale's, whose centre moves with the length."""

import pytest
import torch
from torch import Tensor
from torchscale.component.xpos_relative_position import XPOS

import tests.parity.oracles  # noqa: F401 (makes torchscale importable)
from megatron_kosmos.model.xpos import XPos
from tests.parity.fidelity import Record
from tests.parity.ours import FP64

pytestmark = pytest.mark.parity

HEAD_SIZE, MAX_LENGTH = 64, 2048


def draw(length: int) -> tuple[Tensor, Tensor]:
    """Random queries and keys [T, K] in fp64, so that what differs is the tables alone."""
    generator = torch.Generator().manual_seed(length)
    query, key = torch.randn(2, length, HEAD_SIZE, generator=generator, dtype=torch.float64)
    return query, key


def rotate(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate [T, K] as the model does [T, B, H, K]."""
    rotated = XPos(HEAD_SIZE, MAX_LENGTH)(query[:, None, None], key[:, None, None])
    return rotated[0][:, 0, 0], rotated[1][:, 0, 0]


BOUND = 1e-6
ORACLE = f"torchscale `XPOS`, heads of {HEAD_SIZE}, up to {MAX_LENGTH} tokens"


def causal(scores: Tensor) -> Tensor:
    return scores[torch.ones_like(scores).tril().bool()]


@pytest.mark.parametrize("length", [1, 2, 7, 100, 511, 2048])
def test_scores_are_those_of_torchscale_at_every_length(fidelity: Record, length: int) -> None:
    query, key = draw(length)
    oracle = XPOS(HEAD_SIZE).double()
    expected = oracle(query[None])[0] @ oracle(key[None], downscale=True)[0].T
    rotated_query, rotated_key = rotate(query, key)
    scores = causal(rotated_query @ rotated_key.T)
    fidelity.of(ORACLE, FP64).values("scores", scores, causal(expected), BOUND)
    torch.testing.assert_close(scores, causal(expected), rtol=0, atol=1e-5)
    if length > 2:
        assert (scores - causal(query @ key.T)).abs().max() > 1, "positions change scores"


def test_a_key_rotated_once_serves_every_later_query(fidelity: Record) -> None:
    """torchscale rotates its whole cache again for each new token; here rotated keys stay as they are."""
    query, key = draw(40)
    rotated_query, rotated_key = rotate(query, key)
    oracle = XPOS(HEAD_SIZE).double()
    for length in range(1, 41):
        keys = oracle(key[None, :length], offset=0, downscale=True)[0]
        expected = oracle(query[None, length - 1 : length], offset=length - 1)[0] @ keys.T
        scores = rotated_query[length - 1 : length] @ rotated_key[:length].T
        fidelity.of(ORACLE, FP64).values("scores with cached keys", scores, expected, BOUND)


def test_scores_depend_on_the_distance_alone() -> None:
    query, key = (vector.expand(MAX_LENGTH, HEAD_SIZE) for vector in draw(1))
    rotated_query, rotated_key = rotate(query, key)
    scores = rotated_query @ rotated_key.T
    # Angles in fp32, as torchscale has them, are good to 1e-4 at position 2047.
    for distance in (0, 1, 30, 1000):
        along = scores.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=0, atol=2e-4)


def test_bf16_heads_meet_fp32_tables() -> None:
    """What a bf16 model rotates is good to its own last digit: tables and products are fp32's."""
    query, key = (vector.to(torch.bfloat16) for vector in draw(MAX_LENGTH))
    for rotated, exact in zip(rotate(query, key), rotate(query.double(), key.double()), strict=True):
        assert rotated.dtype == torch.bfloat16
        assert ((rotated.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()
