"""Counted costs of the model's pieces, and the balance of the pipeline that follows from them."""

from typing import Any

import pytest

from megatron_kosmos.config import RunConfig
from megatron_kosmos.engine.builder import decoder_layers_of_chunks
from megatron_kosmos.engine.costs import forward_costs, images_per_sequence, training_costs, training_flops
from megatron_kosmos.engine.dry_run import plan
from megatron_kosmos.engine.pieces import pieces
from megatron_kosmos.observability.flops import causal_pairs, decoder_layer_products, output_products
from tests.distributed.tiny import FIRST_DOCUMENT, LATENTS, LENGTH, MICRO, frozen_vision, step_batches, tiny_run

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
    layers, output = decoder_layer_products(run.model.decoder, LENGTH), output_products(run.model.decoder)
    assert forward.layers == (LENGTH * layers.forward,) * run.model.decoder.num_layers
    assert forward.output == LENGTH * output.forward
    # The number of images need not be whole, so the step is taken as one of a thousand sequences.
    step = training_flops(run, 1000 * LENGTH, round(1000 * images_per_sequence(run)), 1000 * causal_pairs(LENGTH))
    assert 1000 * training.total == pytest.approx(step, rel=1e-3)


CROSS_ATTENTION = {"model__resampler": {"kind": "cross_attention", "num_latents": LATENTS, "num_heads": 4}}
VARIANTS: dict[str, dict[str, Any]] = {
    "xPos": {},
    "learned positions, tied": {"model__decoder__positions": "learned", "model__decoder__tie_embeddings": True},
    "normalized features": {"model__vision__features": "normalized", **CROSS_ATTENTION},
    "query-key norm": {"model__decoder__query_key_norm": True, "model__decoder__num_query_groups": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_pieces_have_the_names_of_the_model(variant: str) -> None:
    """They are known before the model is built: so they are written down once more, and held here."""
    run = tiny_run(**VARIANTS[variant], optimizer__groups=[])
    of_pieces = [name for piece in pieces(run.model) for name in (*piece.matrices, *piece.others)]
    trained = {weight.name for weight in plan(run, 1).weights if weight.is_trained}
    assert set(of_pieces) == trained
    assert len(of_pieces) == len(trained) + run.model.decoder.tie_embeddings  # the matrix of words has two places


def passes(*groups: dict[str, Any], **changes: Any) -> tuple[list[float], float]:
    """Return each decoder layer's and the output projection's training cost in forward passes of products with weights.

    With an FFN this wide next to nothing goes to attention.
    """
    run = tiny_run(optimizer__groups=list(groups), model__decoder__ffn_width=64_000, **changes)
    forward, training = forward_costs(run), training_costs(run)
    return (
        [round(layer / forward.layers[0], 2) for layer in training.layers],
        training.output / forward.output,
    )


def frozen(*patterns: str) -> dict[str, Any]:
    return {"parameters": list(patterns), "frozen": True}


@pytest.mark.parametrize(
    "groups, layers, output",
    [
        ([], [3, 3, 3, 3], 3),
        ([frozen("decoder.*")], [2, 2, 2, 2], 3),
        ([frozen("decoder.*", "output_layer.*")], [2, 2, 2, 2], 2),
        ([frozen("vision_tower.*", "resampler.*", "embedding.*")], [3, 3, 3, 3], 3),
        ([{"parameters": ["decoder.layers.2.*"]}, frozen("*")], [1, 1, 3, 2], 2),
        ([{"parameters": ["decoder.layers.2.*.bias"]}, frozen("*")], [1, 1, 2, 2], 2),
        ([{"parameters": ["output_layer.*"]}, frozen("*")], [1, 1, 1, 1], 3),
    ],
)
def test_a_piece_costs_what_is_trained_in_it_and_below_it(
    groups: list[dict[str, Any]], layers: list[int], output: int
) -> None:
    counted_layers, counted_output = passes(*groups)
    assert counted_layers == pytest.approx(layers, abs=0.01)
    assert counted_output == output


def test_only_what_has_a_backward_pass_is_recomputed() -> None:
    groups = [{"parameters": ["decoder.layers.2.*"]}, frozen("*")]
    layers, _ = passes(*groups, training__recompute="full")
    assert layers == pytest.approx([1, 1, 4, 3], abs=0.01)


@pytest.mark.parametrize("frozen_layers", [0, 1, 3])
def test_forward_costs_do_not_depend_on_what_is_frozen(frozen_layers: int) -> None:
    assert forward_costs(run_with(frozen_layers)) == forward_costs(run_with(frozen_layers=2))


def test_a_frozen_tower_costs_less_to_train() -> None:
    trained, cheaper = training_costs(run_with(frozen_layers=0)), training_costs(run_with(frozen_layers=3))
    assert cheaper.vision_side < trained.vision_side
    assert (cheaper.layers, cheaper.output) == (trained.layers, trained.output)


def test_recomputation_costs_a_decoder_layer_another_forward_pass() -> None:
    kept, recomputed = training_costs(run_with()), training_costs(run_with(training__recompute="full"))
    assert recomputed.mean_layer == kept.mean_layer * 4 / 3
    assert (recomputed.vision_side, recomputed.output) == (kept.vision_side, kept.output)


def test_stage_0_gets_more_layers_when_its_tower_has_no_backward_pass() -> None:
    """Pipelines wait for the dearest stage of forward and backward together, not of the forward pass alone."""
    tower = {"model__vision__width": 64, "model__vision__ffn_width": 256, "parallel__pipeline_parallel_size": 2}
    tower |= {"model__decoder__num_layers": 24}
    trained = decoder_layers_of_chunks(run_with(frozen_layers=0, **tower))
    cheaper = decoder_layers_of_chunks(run_with(frozen_layers=3, **tower))
    assert trained[0] < cheaper[0] <= 12
    assert forward_costs(run_with(frozen_layers=0, **tower)) == forward_costs(run_with(frozen_layers=3, **tower))


def test_configured_chunks_are_taken_as_they_are() -> None:
    run = tiny_run(parallel__pipeline_parallel_size=2, parallel__chunk_layers=[3, 1])
    assert decoder_layers_of_chunks(run) == (3, 1)


def test_masked_documents_cost_less_attention_and_nothing_else() -> None:
    run = run_with()
    (plain,), (masked,) = step_batches(0, "m"), step_batches(0, "d")
    tokens, images = plain.input_ids.numel(), len(plain.image_positions)
    assert plain.num_attention_pairs == MICRO * causal_pairs(LENGTH)
    first, second = causal_pairs(FIRST_DOCUMENT), causal_pairs(LENGTH - FIRST_DOCUMENT)
    assert masked.num_attention_pairs == MICRO * (first + second)
    saved = plain.num_attention_pairs - masked.num_attention_pairs
    costs = [training_flops(run, tokens, images, batch.num_attention_pairs) for batch in (plain, masked)]
    decoder = run.model.decoder
    assert costs[0] - costs[1] == 3 * decoder.num_layers * 4 * decoder.width * saved
