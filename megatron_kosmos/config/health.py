"""How a run watches over itself."""

from pydantic import NonNegativeFloat

from megatron_kosmos.config.base import StrictModel


class HealthConfig(StrictModel):
    """When a run that no longer does well is ended, so that it can be started again."""

    watchdog_seconds: NonNegativeFloat = 300.0
    """Longest that a rank may stay in one part of a step before the run is ended as hung, with every rank's stacks in
    run_dir/hang; 0: for ever. Starting, the first step, evaluating and saving may take four times as long."""
