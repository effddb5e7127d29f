"""The splice: images in their slots, tokens elsewhere, and gradients only where something was used."""

import pytest
import torch
from torch import Tensor
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2TextSinusoidalPositionalEmbedding

from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.builder import build_chunks, derive_transformer_config
from megatron_kosmos.model.embedding import SinusoidalPositions, splice
from megatron_kosmos.model.initialization import initialize
from megatron_kosmos.parallel.topology import build_topology
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import LATENTS, LENGTH, step_batches, tiny_run

B, T, D, L = 2, 7, 4, 3
POSITIONS = torch.tensor([[0, 1], [1, 0], [1, 4]])


def tokens_and_images(num_images: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, D, generator=draw, requires_grad=True)
    return hidden, torch.randn(num_images, L, D, generator=draw, requires_grad=True)


def test_images_stand_in_their_slots_and_tokens_elsewhere() -> None:
    hidden, images = tokens_and_images(num_images=3)
    expected = hidden.detach().clone()
    expected[0, 1:4], expected[1, 0:3], expected[1, 4:7] = images.detach()
    assert torch.equal(splice(hidden, images, POSITIONS), expected)


def test_gradients_go_to_what_was_used() -> None:
    """Blank images behind the real ones get zeros, not nothing: their operations must run on every rank."""
    hidden, images = tokens_and_images(num_images=5)
    weight = torch.randn(B, T, D)
    (splice(hidden, images, POSITIONS) * weight).sum().backward()
    assert images.grad is not None
    assert torch.equal(images.grad[:3], torch.stack((weight[0, 1:4], weight[1, 0:3], weight[1, 4:7])))
    assert torch.equal(images.grad[3:], torch.zeros(2, L, D))
    is_slot = torch.zeros(B, T, 1, dtype=torch.bool)
    is_slot[0, 1:4] = is_slot[1, 0:3] = is_slot[1, 4:7] = True
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, weight.masked_fill(is_slot, 0.0))


def test_without_images_nothing_changes_and_the_blank_image_gets_zeros() -> None:
    hidden, images = tokens_and_images(num_images=1)
    result = splice(hidden, images, torch.empty(0, 2, dtype=torch.int64))
    assert torch.equal(result, hidden)
    result.sum().backward()
    assert images.grad is not None
    assert torch.equal(images.grad, torch.zeros_like(images))


@pytest.mark.parametrize("width", [4, 32, 2048])
def test_sinusoids_are_kosmos_2_s(width: int) -> None:
    """Bit for bit: transformers derives position ids from tokens, of which none is padding here."""
    reference = Kosmos2TextSinusoidalPositionalEmbedding(64, width, padding_idx=1)
    expected = reference(input_ids=torch.full((2, 50), 7))
    assert torch.equal(SinusoidalPositions(64, width)(torch.arange(50).expand(2, -1)), expected)


def test_sinusoids_follow_positions_that_restart() -> None:
    position_ids = torch.tensor([[0, 1, 2, 0, 1]])
    rows = SinusoidalPositions(8, 16)(position_ids)
    assert torch.equal(rows[0, :2], rows[0, 3:])
    assert not torch.equal(rows[0, 2], rows[0, 3])


def embed_mixed_batch(run: RunConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the model's embedding gives, what it is made of, and the gradient of the word embeddings."""
    topology = build_topology(run.parallel, torch.device("cpu"))
    (chunk,) = build_chunks(run, derive_transformer_config(run), topology)
    initialize(chunk, run.training.seed)
    batch = step_batches(0, "m")[0]
    images = chunk.embed_images(batch.images, len(batch.images))
    hidden_TBD = chunk.embedding(batch.input_ids, batch.position_ids, images, batch.image_positions)
    parts = chunk.embedding.word_embeddings.weight[batch.input_ids].clone()
    for (row, column), image in zip(batch.image_positions.tolist(), images, strict=True):
        parts[row, column : column + LATENTS] = image
    if run.model.decoder.scale_embeddings:
        parts = parts * run.model.decoder.width**0.5
    if run.model.decoder.positions == "learned":
        parts = parts + chunk.get_parameter("embedding.position_embeddings.weight")[:LENGTH]
    if run.model.decoder.positions == "sinusoidal":
        parts = parts + chunk.get_buffer("embedding.position_embeddings.table")[:LENGTH]
    hidden_TBD.sum().backward()
    gradient = chunk.embedding.word_embeddings.weight.grad
    assert gradient is not None
    return hidden_TBD.detach(), parts.transpose(0, 1).detach(), gradient


@pytest.mark.distributed
@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("positions", ["none", "learned", "sinusoidal"])
def test_images_are_scaled_and_get_positions_as_tokens_do(positions: str, scaled: bool) -> None:
    run = tiny_run(model__decoder__positions=positions, model__decoder__scale_embeddings=scaled)
    hidden, parts, _ = run_ranks(embed_mixed_batch, 1, run)[0]
    torch.testing.assert_close(hidden, parts, atol=0.0, rtol=0.0)


@pytest.mark.distributed
def test_tokens_under_images_teach_the_word_embeddings_nothing() -> None:
    """The slots hold the padding id 0, which stands nowhere else in the batch."""
    _, _, gradient = run_ranks(embed_mixed_batch, 1, tiny_run())[0]
    assert torch.equal(gradient[0], torch.zeros_like(gradient[0]))
    assert gradient[step_batches(0, "m")[0].input_ids[0, 0]].abs().min() >= 1.0
