"""What may change when a run goes on from a checkpoint: what is refused, and what is said of the rest.

Any layout may follow any other. Precision and optimizer may change: masters, moments and count of updates go on as they
were saved, moments rounded where they are kept in 8 bits. The network, the data and their order may not change.

What is frozen may change. Newly trained parameters start with zero moments. Adam's bias correction counts the run's
updates, not theirs: with betas of 0.9 and 0.98 and an unchanging gradient their updates are 0.7 times the learning rate
at first, 1.6 times after some 15 steps, and like all others after some 200. Newly frozen parameters keep their weight:
the saved master in the precision that the model computes in.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_kosmos.checkpoint.errors import CheckpointError
from megatron_kosmos.config import ModelConfig, RunConfig
from megatron_kosmos.config.data import data_step

_NOT_ARCHITECTURE = (
    "dropout",
    "attention_dropout",
    "pretrained",
    "embedding_std",
    "position_embedding_std",
    "query_key_gain",
)
"""Model settings that a run may change without the weights being others."""

_COMPARED = ("model", "parallel", "kernels", "training", "optimizer")
"""Sections of the configuration whose changes are told."""

_OTHERWISE_TOLD = ("optimizer.groups",)

ABSENT = object()
"""Stands for the value of a setting that is not there, where None may be a value."""

_EFFECTS = {
    "training.precision": {
        "bf16": "masters and moments go on as saved, and the model computes with the masters rounded to bf16",
        "fp32": "masters and moments go on as saved, and the model computes with the masters",
    },
    "optimizer.kind": {
        "adamw_8bit": "moments are reset to their nearest 8-bit values, masters and count of updates go on as saved",
        "adamw": "moments go on in fp32 from their 8-bit values, masters and count of updates as saved",
    },
}
"""What follows from a setting's new value."""


def check_resumption(folder: Path, state: Mapping[str, Any], run: RunConfig, data: str | None) -> None:
    """Raise CheckpointError, naming what differs, where `run` can't go on from the checkpoint whose JSON is `state`.

    `data` is the fingerprint of the training data; None allows any.
    """
    _check_architecture(folder, state, run)
    if state["step"] == 0:
        return  # A converted checkpoint has read no data: any will do.
    _check_order(folder, state, run)
    if data is not None and state["data"] != data:
        raise CheckpointError(
            f"{folder} was trained on other data: corpora, weights, tokenizer, sequence length or packing have "
            f"changed, so the run can't go on where it was; restore data.* or start a new run_dir"
        )
    if data is not None:
        check_skipped_steps(folder, state, run)


def changed_settings(state: Mapping[str, Any], run: RunConfig) -> Iterator[str]:
    """Yield a line for each setting that a run changes as it goes on from a checkpoint, with what follows from it."""
    saved, now = (flat(config, _COMPARED) for config in (state["config"], run.model_dump(mode="json")))
    for field in now:
        before = saved.get(field, ABSENT)
        if before is ABSENT or before == now[field] or field in _OTHERWISE_TOLD:
            continue
        effect = _EFFECTS.get(field, {}).get(now[field])
        yield f"{field} is {now[field]!r}, was {before!r} in the checkpoint" + (f": {effect}" if effect else "")


def flat(config: Mapping[str, Any], sections: Iterable[str]) -> dict[str, Any]:
    """Return the settings of some sections under dotted names."""

    def walk(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield from walk(f"{prefix}.{key}", inner)
        else:
            yield prefix, value

    return dict(item for section in sections for item in walk(section, config.get(section, {})))


def _check_order(folder: Path, state: Mapping[str, Any], run: RunConfig) -> None:
    """Refuse to go on with another order of the data, which follows from seed and global batch (decision 5)."""
    for field in ("seed", "global_batch_size"):
        saved, now = state["config"]["training"][field], getattr(run.training, field)
        if saved != now:
            raise CheckpointError(
                f"{folder} was trained with training.{field}={saved}, not {now}: with another one the data would go on "
                f"somewhere else; restore it or start a new run_dir"
            )


def check_skipped_steps(folder: Path, state: Mapping[str, Any], run: RunConfig) -> None:
    """Refuse other stretches of skipped data before the checkpoint; behind it they may change."""
    saved = _skipped_before(state["step"], state["config"]["data"].get("skip_steps", ()))
    now = _skipped_before(state["step"], run.data.skip_steps)
    if saved != now:
        raise CheckpointError(
            f"{folder} was trained with data.skip_steps={saved} before its step {state['step']}, not {now}; "
            f"restore them, or go on from a checkpoint before the stretch that is to be skipped"
        )


def _skipped_before(step: int, skip_steps: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the stretches that the first `step` steps passed over."""
    next_step = data_step(step - 1, skip_steps) + 1
    return [[first, last] for first, last in skip_steps if last < next_step]


def _check_architecture(folder: Path, state: Mapping[str, Any], run: RunConfig) -> None:
    """Refuse a checkpoint of another network, naming the fields that differ."""
    fields = differing_fields(_with_defaults(state["config"]["model"]), run.model_dump(mode="json")["model"])
    if fields:
        lines = [f"{name}: {saved} in the checkpoint, {now} now" for name, saved, now in fields]
        raise CheckpointError(f"{folder} holds another model:\n  " + "\n  ".join(lines))


def _with_defaults(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a checkpoint's section `model` with the fields that the version which saved it did not have."""
    try:
        return ModelConfig.model_validate(model).model_dump(mode="json")
    except ValidationError:  # of another version altogether: what differs is told as it stands there
        return model


def differing_fields(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the fields that make two `model` sections different networks, each with both values as text."""
    return [
        (f"model.{part}.{field}", _shown(one[part], field), _shown(other[part], field))
        for part in other
        # Which fields a part has may depend on its kind.
        for field in dict.fromkeys((*one[part], *other[part]))
        if field not in _NOT_ARCHITECTURE and _shown(one[part], field) != _shown(other[part], field)
    ]


def _shown(fields: Mapping[str, Any], name: str) -> str:
    return repr(fields[name]) if name in fields else "absent"
