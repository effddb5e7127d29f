"""What a run tells of itself, and where beside its own folder."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from megatron_kosmos.config.base import StrictModel


class WandbConfig(StrictModel):
    """A run at Weights & Biases; needs the extra `wandb`."""

    project: Annotated[str, Field(min_length=1)]
    entity: str | None = None
    """User or team; null is the default of who is logged in."""
    mode: Literal["online", "offline"] = "online"
    """offline writes into the run folder only, for `wandb sync` later."""


class MlflowConfig(StrictModel):
    """A run at an MLflow server or in a database; needs the extra `mlflow`."""

    tracking_uri: Annotated[str, Field(min_length=1)]
    """Such as http://HOST:5000, or sqlite:///FILE without a server."""
    experiment: Annotated[str, Field(min_length=1)] = "kosmos"
    """Made if it is not there."""


class LoggingConfig(StrictModel):
    """What the loop writes and how often, in optimizer steps."""

    metrics_every: PositiveInt = 1
    """Steps between lines of metrics.jsonl and points in TensorBoard."""
    profile_steps: tuple[int, int] | None = None
    """First and last step, counted from 1, to record with torch.profiler for TensorBoard; null records none."""
    wandb: WandbConfig | None = None
    """Send the metrics to Weights & Biases too; null doesn't."""
    mlflow: MlflowConfig | None = None
    """Send the metrics to MLflow too; null doesn't."""

    @model_validator(mode="after")
    def _profile_is_a_range(self) -> Self:
        if self.profile_steps is not None and not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
            raise ValueError(f"profile_steps={list(self.profile_steps)} must be [first, last] with 1 <= first <= last")
        return self
