"""The strict base of every configuration model: frozen, no unknown keys, no silent conversions."""

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """A frozen pydantic model without unknown keys, NaN or infinity; docstrings of fields are their descriptions."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )
