"""Counted costs of the model's pieces, and the balance of the pipeline that follows from them."""

from typing import Any

import pytest

from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.builder import decoder_layers_of_chunks
from megatron_kosmos.engine.costs import forward_costs, images_per_sequence, num_frozen_vision_layers, training_costs
from megatron_kosmos.observability.flops import decoder_forward_flops_per_token, training_flops
from tests.distributed.tiny import LATENTS, LENGTH, frozen_vision, tiny_run

MIXTURE = [
    {"kind": "text", "prefix": "a", "weight": 2.0},
    {"kind": "caption", "prefix": "b", "weight": 3.0},
    {"kind": "caption", "prefix": "c", "weight": 2.0},
    {"kind": "interleaved", "prefix": "d", "weight": 1.0},
]


def run_with(frozen_layers: int = 1, **changes: Any) -> RunConfig:
    return tiny_run(data__train=MIXTURE, optimizer__groups=frozen_vision(frozen_layers), **changes)


def test_images_of_a_sequence_follow_from_the_mixture() -> None:
    """5 of 8 tokens are captions, an image every 2 L of them; 1 of 8 is in interleaved documents, one every 4 L."""
    assert images_per_sequence(run_with()) == pytest.approx(LENGTH * (5 / 8 / (2 * LATENTS) + 1 / 8 / (4 * LATENTS)))
    assert images_per_sequence(tiny_run()) == 0.0


def test_pieces_add_up_to_the_whole_model() -> None:
    run = run_with()
    forward, training = forward_costs(run), training_costs(run)
    layers = run.model.decoder.num_layers
    assert layers * forward.layer + forward.output == pytest.approx(
        LENGTH * decoder_forward_flops_per_token(run.model.decoder, LENGTH)
    )
    # The number of images need not be whole, so the step is taken as one of a thousand sequences.
    step = training_flops(
        run.model, LENGTH, 1000 * LENGTH, round(1000 * images_per_sequence(run)), num_frozen_vision_layers(run)
    )
    pieces = layers * training.layer + training.output + training.vision_side
    assert 1000 * pieces == pytest.approx(step, rel=1e-3)


@pytest.mark.parametrize("frozen_layers", [0, 1, 3])
def test_forward_costs_do_not_depend_on_what_is_frozen(frozen_layers: int) -> None:
    assert forward_costs(run_with(frozen_layers)) == forward_costs(run_with(frozen_layers=2))


def test_a_frozen_tower_costs_less_to_train() -> None:
    trained, frozen = training_costs(run_with(frozen_layers=0)), training_costs(run_with(frozen_layers=3))
    assert frozen.vision_side < trained.vision_side
    assert (frozen.layer, frozen.output) == (trained.layer, trained.output)


def test_recomputation_costs_a_decoder_layer_another_forward_pass() -> None:
    kept, recomputed = training_costs(run_with()), training_costs(run_with(training__recompute="full"))
    assert recomputed.layer == kept.layer * 4 / 3
    assert (recomputed.vision_side, recomputed.output) == (kept.vision_side, kept.output)


def test_stage_0_gets_more_layers_when_its_tower_has_no_backward_pass() -> None:
    """Pipelines wait for the dearest stage of forward and backward together, not of the forward pass alone."""
    tower = {"model__vision__width": 64, "model__vision__ffn_width": 256, "parallel__pipeline_parallel_size": 2}
    tower |= {"model__decoder__num_layers": 24}
    trained = decoder_layers_of_chunks(run_with(frozen_layers=0, **tower))
    frozen = decoder_layers_of_chunks(run_with(frozen_layers=3, **tower))
    assert trained[0] < frozen[0] <= 12
    assert forward_costs(run_with(frozen_layers=0, **tower)) == forward_costs(run_with(frozen_layers=3, **tower))


def test_configured_chunks_are_taken_as_they_are() -> None:
    run = tiny_run(parallel__pipeline_parallel_size=2, parallel__chunk_layers=[3, 1])
    assert decoder_layers_of_chunks(run) == (3, 1)
