"""How a run watches over itself."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from megatron_kosmos.config.base import StrictModel


class HealthConfig(StrictModel):
    """When a run that no longer does well passes over a step, goes back, or is ended."""

    watchdog_seconds: NonNegativeFloat = 300.0
    """Longest that a rank may stay in one part of a step before the run is ended as hung, with every rank's stacks in
    run_dir/hang; 0: for ever. Starting, the first step, evaluating and saving may take four times as long."""
    max_bad_steps_in_a_row: PositiveInt = 10
    """So many steps with NaN or infinity in loss or gradients, each of which leaves the weights alone, end the run."""
    spike_deviations: NonNegativeFloat = 0.0
    """A loss is a spike when it lies more than so many standard deviations above the median of those before it; 0:
    none is. The deviation is 1.4826 times the median distance from the median, at least a thousandth of that."""
    spike_window: Annotated[int, Field(ge=8)] = 128
    """Steps before a loss that it is compared with; before there are so many, nothing is a spike."""
    on_spike: Literal["report", "roll_back"] = "report"
    """`report` writes it to run_dir/health.jsonl. `roll_back` also ends the run as interrupted; started again, it goes
    on from the newest checkpoint without the data of the spike."""
    spike_skip_steps: PositiveInt = 1
    """Steps whose data are passed over after a roll-back: the spike's and those just before it."""
    max_rollbacks: NonNegativeInt = 3
    """Roll-backs of the whole run. The spike after the last one ends it."""

    @model_validator(mode="after")
    def _rolls_back_from_something(self) -> Self:
        if self.on_spike == "roll_back" and not self.spike_deviations:
            raise ValueError("on_spike=roll_back does nothing while spike_deviations=0 looks for no spikes; 10 is rare")
        return self
