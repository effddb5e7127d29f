"""The keys of a run's YAML are a promise: they change only together with the list beside this file."""

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from pydantic import BaseModel

from megatron_kosmos.config import RunConfig

FROZEN_KEYS = Path(__file__).with_name("config_keys.txt")


def dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the key of every setting below `model`; `[]` stands for the elements of a list."""
    for name, field in model.model_fields.items():
        annotation = field.annotation
        candidates = (annotation, *get_args(annotation))
        section = next((kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if section is None:
            yield prefix + name
        else:
            yield from dotted_keys(section, f"{prefix}{name}{'' if section is annotation else '[]'}.")


def test_the_keys_are_those_of_the_list() -> None:
    """A new key is added to config_keys.txt; a removed or renamed one breaks users' files and needs a decision."""
    assert list(dotted_keys(RunConfig)) == FROZEN_KEYS.read_text().splitlines()
