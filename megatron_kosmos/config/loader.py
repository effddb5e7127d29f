"""Reading a run's YAML files with dotted overrides, and writing the resolved configuration back."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from megatron_kosmos.config.errors import ConfigError
from megatron_kosmos.config.run import RunConfig


def load_config(paths: Path | Sequence[Path], overrides: Sequence[str] = ()) -> RunConfig:
    """Read `paths`, apply `a.b=c` overrides in order (`a.0.b=c` inside a list) and return the checked configuration.

    Of several files each changes what the ones before it say: key by key, lists as wholes. Raises ConfigError for a
    missing file, broken YAML, an unknown field, a wrong type or an illegal combination.
    """
    paths = [paths] if isinstance(paths, Path) else paths
    origin = " and ".join(map(str, paths)) + (f" with {' '.join(overrides)}" if overrides else "")
    trees = [_read(path) for path in paths]
    try:
        tree = OmegaConf.merge(*trees)
        for override in overrides:
            field, equals, value = override.partition("=")
            if not equals:
                raise ConfigError(f"override {override!r} is not of the form a.b=c")
            OmegaConf.update(tree, field, _parse(value))
        values = OmegaConf.to_container(tree, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, AttributeError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{origin}: {error}") from error
    return parse_config(values, origin)


def find_run_dir(paths: Sequence[Path], overrides: Sequence[str] = ()) -> Path | None:
    """Return the run's folder as far as it can be told from a configuration that `load_config` refuses."""
    for override in reversed(overrides):
        field, _, value = override.partition("=")
        if field == "run_dir" and value:
            return Path(value)
    for path in reversed(paths):
        with suppress(ConfigError):
            tree = _read(path)
            run_dir = tree.get("run_dir") if isinstance(tree, DictConfig) else None
            if isinstance(run_dir, str):
                return Path(run_dir)
    return None


def _read(path: Path) -> DictConfig | ListConfig:
    try:
        return OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"no configuration at {path} ({error.strerror}); the presets are in configs/") from error
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error


def _parse(value: str) -> object:
    """Read an override's value as OmegaConf reads a file's: unlike plain YAML 1.1 it takes 1e-4 for a number."""
    return OmegaConf.select(OmegaConf.from_dotlist([f"value={value}"]), "value")


def parse_config(values: object, origin: str) -> RunConfig:
    """Check plain `values` read from `origin`. Raises ConfigError naming each bad field.

    They are checked as strict JSON, where "5" is no number and 1.0 no integer, but a list may become a tuple and a
    string a path.
    """
    try:
        return RunConfig.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        lines = [f"{origin}: {error.error_count()} problem(s)"]
        for problem in error.errors():
            field = ".".join(_keys_of(problem["loc"], values)) or "(whole configuration)"
            shows_input = problem["type"] != "missing" and not isinstance(problem["input"], dict)
            given = f" (got {problem['input']!r})" if shows_input else ""
            lines.append(f"  {field}: {problem['msg'].removeprefix('Value error, ')}{given}")
        raise ConfigError("\n".join(lines)) from error


def _keys_of(location: Sequence[int | str], values: Any) -> Iterator[str]:
    """Yield the keys that lead to a problem in `values`; pydantic also names the kind where there are several."""
    for part in location:
        if isinstance(values, dict) and part not in values and values.get("kind") == part:
            continue
        yield str(part)
        try:
            values = values[part]
        except (LookupError, TypeError):
            values = None


def save_config(config: RunConfig, path: Path) -> None:
    """Write every resolved setting to `path` as YAML that `load_config` reads back to an equal configuration."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
