"""Which kernels a run computes with: what its settings ask for, held against what every rank's machine has."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_kosmos.config import ConfigError, RunConfig

_APEX_COMMAND = (
    "apex is NVIDIA's and built from source, against this torch and its CUDA toolkit: APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "
    "pip install -v --no-build-isolation --config-settings '--build-option=--cpp_ext' "
    "--config-settings '--build-option=--cuda_ext' git+https://github.com/NVIDIA/apex"
)
_GPU_EXTRA = "pip install --no-build-isolation -e '.[gpu]', after the rest (docs/versions.md)"


@dataclass(frozen=True)
class Kernels:
    """What computes what, decided. The values are those of `config.KernelsConfig` without `auto`."""

    attention: str = "sdpa"
    layer_norm: str = "torch"
    softmax: str = "torch"
    gradient_accumulation: str = "torch"

    def __str__(self) -> str:
        softmax = f" ({self.softmax} softmax)" if self.attention == "unfused" else ""
        return (
            f"attention {self.attention}{softmax}, layer norm {self.layer_norm}, "
            f"gradient accumulation {self.gradient_accumulation}"
        )


PLAIN = Kernels()
"""Torch's own everywhere: runs on any machine."""


class Obstacle(IntEnum):
    """Why a kernel's library can't be used on this rank, from none to the worst."""

    NONE = 0
    ABSENT = 1
    DOES_NOT_LOAD = 2
    OTHER_PACKAGE = 3
    """The package `apex` of the public index, which has nothing to do with NVIDIA's."""
    OLD_GPU = 4
    NO_CUDA = 5


@dataclass(frozen=True)
class Library:
    """What a kernel needs to be imported, and how one gets it."""

    name: str
    modules: tuple[str, ...]
    how_to_install: str
    least_compute_capability: int = 0


_FLASH = Library("flash-attn", ("flash_attn",), _GPU_EXTRA, least_compute_capability=8)
_TE = Library("TransformerEngine", ("transformer_engine.pytorch",), _GPU_EXTRA)
_APEX_NORM = Library("apex", ("apex.normalization.fused_layer_norm", "fused_layer_norm_cuda"), _APEX_COMMAND)
_APEX_SOFTMAX = Library(
    "apex",
    ("apex", "scaled_upper_triang_masked_softmax_cuda", "scaled_masked_softmax_cuda"),
    _APEX_COMMAND,
)
_APEX_SUMS = Library("apex", ("apex", "fused_weight_gradient_mlp_cuda"), _APEX_COMMAND)

Choice = tuple[str, str]
"""A key of `kernels` and a value."""
LIBRARIES: Mapping[Choice, Library] = {
    ("attention", "flash"): _FLASH,
    ("layer_norm", "apex"): _APEX_NORM,
    ("layer_norm", "te"): _TE,
    ("softmax", "apex"): _APEX_SOFTMAX,
    ("gradient_accumulation", "apex"): _APEX_SUMS,
}
"""The choices that need more than torch and megatron-core."""
_FASTEST_FIRST: Mapping[str, Sequence[str]] = {
    "attention": ("flash", "sdpa"),
    "layer_norm": ("apex", "te", "torch"),
    "softmax": ("apex", "torch"),
    "gradient_accumulation": ("apex", "torch"),
}
"""What `auto` tries."""


def choose_kernels(run: RunConfig, device: torch.device) -> Kernels:
    """Return the kernels of `run`, the same on every rank: what one rank lacks none uses.

    Raises ConfigError on every rank alike where one that is named can't be used. All-reduce over all ranks.
    """
    obstacles = torch.tensor(list(obstacles_on(device).values()), device=device)
    dist.all_reduce(obstacles, op=dist.ReduceOp.MAX)
    worst = [Obstacle(value) for value in obstacles.tolist()]
    return resolve(run, dict(zip(LIBRARIES, worst, strict=True)))


def obstacles_on(device: torch.device) -> dict[Choice, Obstacle]:
    """Try every library on this machine's `device`, in the order of `LIBRARIES`."""
    return {choice: _obstacle(library, device) for choice, library in LIBRARIES.items()}


def resolve(run: RunConfig, obstacles: Mapping[Choice, Obstacle]) -> Kernels:
    """Return the kernels of `run` where the libraries meet `obstacles`. Raises ConfigError as `choose_kernels`."""

    def choose(key: str, fits: Callable[[str], str | None]) -> str:
        asked: str = getattr(run.kernels, key)
        if asked == "auto":
            return next(name for name in _FASTEST_FIRST[key] if not (fits(name) or why_missing((key, name), obstacles)))
        if reason := fits(asked) or why_missing((key, asked), obstacles):
            raise ConfigError(f"kernels.{key}={asked}: {reason}. kernels.{key}=auto takes the fastest that is there")
        return asked

    attention = choose("attention", lambda name: _attention_misfit(run, name))
    return Kernels(
        attention=attention,
        layer_norm=choose("layer_norm", lambda _: None),
        softmax=choose("softmax", lambda name: _softmax_misfit(run, name, attention)),
        gradient_accumulation=choose("gradient_accumulation", lambda name: _accumulation_misfit(run, name)),
    )


def _attention_misfit(run: RunConfig, name: str) -> str | None:
    head_size = run.model.decoder.head_size
    if name != "flash":
        return None
    if run.training.precision != "bf16":
        return f"flash-attn computes in bf16, and training.precision={run.training.precision}"
    return f"flash-attn has heads of up to 256, and width / num_heads = {head_size}" if head_size > 256 else None


def _softmax_misfit(run: RunConfig, name: str, attention: str) -> str | None:
    if name != "apex":
        return None
    if attention != "unfused":
        return f"it is part of kernels.attention=unfused, and attention is {attention}, which has a softmax of its own"
    return _needs_bf16(run)


def _accumulation_misfit(run: RunConfig, name: str) -> str | None:
    if name != "apex":
        return None
    if run.parallel.zero_stage != 1:
        return (
            f"it adds to whole fp32 sums, which are kept at parallel.zero_stage=1 and not at {run.parallel.zero_stage}"
        )
    return _needs_bf16(run)


def _needs_bf16(run: RunConfig) -> str | None:
    return (
        None if run.training.precision == "bf16" else f"it is for bf16, and training.precision={run.training.precision}"
    )


def why_missing(choice: Choice, obstacles: Mapping[Choice, Obstacle]) -> str | None:
    """Return why the choice's library can't be used and how to get it, None where it can or there is none."""
    obstacle = obstacles.get(choice, Obstacle.NONE)
    if obstacle == Obstacle.NONE:
        return None
    library = LIBRARIES[choice]
    return {
        Obstacle.ABSENT: f"{library.name} is not installed, or without this kernel. {library.how_to_install}",
        Obstacle.DOES_NOT_LOAD: f"{library.name} is installed, but does not load; it was built for another torch or "
        f"CUDA. {library.how_to_install}",
        Obstacle.OTHER_PACKAGE: "the apex that is installed is another package, the one of that name on PyPI: "
        f"pip uninstall apex. {library.how_to_install}",
        Obstacle.OLD_GPU: f"{library.name} needs a GPU of compute capability {library.least_compute_capability}.0",
        Obstacle.NO_CUDA: f"{library.name} needs an NVIDIA GPU, and torch finds none here. Where there is one: "
        f"{library.how_to_install}",
    }[obstacle]


def _obstacle(library: Library, device: torch.device) -> Obstacle:
    """Try the library here. Imports it, since a package that is there may not load."""
    if device.type != "cuda":
        return Obstacle.NO_CUDA
    if torch.cuda.get_device_capability(device)[0] < library.least_compute_capability:
        return Obstacle.OLD_GPU
    return import_obstacle(library.modules)


def import_obstacle(modules: Sequence[str]) -> Obstacle:
    """Import `modules` in order and return what is in the way, if anything."""
    root = importlib.util.find_spec(modules[0].partition(".")[0])
    if root is None:
        return Obstacle.ABSENT
    if root.name == "apex" and not any((Path(folder) / "normalization").is_dir() for folder in _folders(root)):
        return Obstacle.OTHER_PACKAGE
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            return Obstacle.ABSENT if error.name == name else Obstacle.DOES_NOT_LOAD
        except (ImportError, OSError, RuntimeError):
            return Obstacle.DOES_NOT_LOAD
    return Obstacle.NONE


def _folders(package: ModuleSpec) -> Sequence[str]:
    return package.submodule_search_locations or ()
