"""What is refused when a run goes on from a checkpoint, and what is said of the settings that changed."""

from pathlib import Path
from typing import Any

import pytest

from megatron_kosmos.checkpoint.errors import CheckpointError
from megatron_kosmos.engine.resumption import changed_settings, check_resumption
from tests.distributed.tiny import tiny_run

CROSS_ATTENTION = {"kind": "cross_attention", "num_latents": 3, "num_heads": 4}
FOLDER = Path("checkpoints/step_00000010")


def saved_state(**changes: Any) -> dict[str, Any]:
    return {"step": 10, "data": "fingerprint", "config": tiny_run(**changes).model_dump(mode="json")}


def test_a_run_that_changes_nothing_goes_on_in_silence() -> None:
    check_resumption(FOLDER, saved_state(), tiny_run(run_dir="elsewhere", logging__metrics_every=7), "fingerprint")
    assert list(changed_settings(saved_state(), tiny_run(run_dir="elsewhere", logging__metrics_every=7))) == []


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (
            {},
            {"parallel__tensor_parallel_size": 2, "optimizer__learning_rate": 0.5, "model__decoder__dropout": 0.1},
            [
                "model.decoder.dropout is 0.1, was 0.0 in the checkpoint",
                "parallel.tensor_parallel_size is 2, was 1 in the checkpoint",
                "optimizer.learning_rate is 0.5, was 0.01 in the checkpoint",
            ],
        ),
        (
            {"training__precision": "fp32"},
            {"training__precision": "bf16"},
            [
                "training.precision is 'bf16', was 'fp32' in the checkpoint: masters and moments go on as saved, and "
                "the model computes with the masters rounded to bf16"
            ],
        ),
        (
            {"optimizer__kind": "adamw"},
            {"optimizer__kind": "adamw_8bit"},
            [
                "optimizer.kind is 'adamw_8bit', was 'adamw' in the checkpoint: moments are reset to their nearest "
                "8-bit values, masters and count of updates go on as saved"
            ],
        ),
        (
            {"optimizer__kind": "adamw_8bit"},
            {"optimizer__kind": "adamw"},
            [
                "optimizer.kind is 'adamw', was 'adamw_8bit' in the checkpoint: moments go on in fp32 from their 8-bit "
                "values, masters and count of updates as saved"
            ],
        ),
    ],
)
def test_every_change_is_said_with_what_it_resets(
    before: dict[str, Any], after: dict[str, Any], said: list[str]
) -> None:
    check_resumption(FOLDER, saved_state(**before), tiny_run(**after), "fingerprint")
    assert list(changed_settings(saved_state(**before), tiny_run(**after))) == said


def test_a_setting_that_an_older_version_did_not_have_is_no_change() -> None:
    state = saved_state()
    del state["config"]["optimizer"]["kind"]
    assert list(changed_settings(state, tiny_run())) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model__decoder__num_layers": 5}, "model.decoder.num_layers: 4 in the checkpoint, 5 now"),
        ({"model__vision__patch_size": 4}, "model.vision.patch_size: 8 in the checkpoint, 4 now"),
        ({"model__decoder__tie_embeddings": True}, "model.decoder.tie_embeddings: False in the checkpoint, True now"),
        ({"training__seed": 3}, "was trained with training.seed=1, not 3"),
        ({"training__global_batch_size": 4}, "was trained with training.global_batch_size=8, not 4"),
    ],
)
def test_another_network_or_order_is_refused_with_the_fields_that_differ(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        check_resumption(FOLDER, saved_state(), tiny_run(**change), "fingerprint")
    assert message in str(raised.value)
    assert str(FOLDER) in str(raised.value)


FREE = {
    "decoder.dropout",
    "decoder.attention_dropout",
    "vision.pretrained",
    "vision.position_embedding_std",
    "resampler.query_key_gain",
}
"""Settings of the model that may change: they are no part of the network, or only of its beginning."""


@pytest.mark.parametrize("resampler", [{}, {"model__resampler": CROSS_ATTENTION}], ids=["perceiver", "cross-attention"])
def test_every_setting_of_the_network_counts_but_for_dropout_and_initialization(resampler: dict[str, Any]) -> None:
    accepted, run = set(), tiny_run(**resampler)
    for part, fields in run.model.model_dump(mode="json").items():
        for field in fields:
            state = saved_state(**resampler)
            state["config"]["model"][part][field] = "another"
            try:
                check_resumption(FOLDER, state, run, "fingerprint")
                accepted.add(f"{part}.{field}")
            except CheckpointError as error:
                assert f"model.{part}.{field}: 'another' in the checkpoint, " in str(error)  # noqa: PT017
    known = {f"{part}.{field}" for part, fields in run.model.model_dump().items() for field in fields}
    assert accepted == (FREE | {"decoder.embedding_std", "resampler.attention_dropout"}) & known


def test_a_field_that_an_older_version_did_not_have_counts_as_its_default() -> None:
    state = saved_state()
    del state["config"]["model"]["decoder"]["query_key_norm"]
    check_resumption(FOLDER, state, tiny_run(), "fingerprint")
    with pytest.raises(CheckpointError, match=r"model\.decoder\.query_key_norm: False in the checkpoint, True now"):
        check_resumption(FOLDER, state, tiny_run(model__decoder__query_key_norm=True), "fingerprint")


def test_other_data_are_refused() -> None:
    with pytest.raises(CheckpointError, match="was trained on other data"):
        check_resumption(FOLDER, saved_state(), tiny_run(), "another fingerprint")
    check_resumption(FOLDER, saved_state(), tiny_run(), None)
