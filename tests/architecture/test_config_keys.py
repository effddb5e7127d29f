"""The keys of a run's YAML are a promise: they change only together with the list beside this file."""

from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_origin

from pydantic import BaseModel

from megatron_kosmos.config import RunConfig

FROZEN_KEYS = Path(__file__).with_name("config_keys.txt")


def dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the key of every setting below `model`; `[]` stands for the elements of a list, and the keys of a section
    of several kinds follow one kind after the other."""
    for name, field in model.model_fields.items():
        annotation = field.annotation
        candidates = (annotation, *get_args(annotation))
        sections = [kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)]
        is_list = get_origin(annotation) is tuple
        if not sections:
            yield prefix + name
        for section in sections:
            yield from dotted_keys(section, f"{prefix}{name}{'[]' if is_list else ''}.")


def test_the_keys_are_those_of_the_list() -> None:
    """A new key is added to config_keys.txt; a removed or renamed one breaks users' files and needs a decision."""
    assert list(dotted_keys(RunConfig)) == FROZEN_KEYS.read_text().splitlines()
