"""Running megatron-core without CUDA: each of its modules sees a `torch` whose CUDA calls mean the CPU.

megatron-core 0.16 asks for `torch.cuda.current_device()` and `device="cuda"` in places that CPU training reaches
(pipeline communication, embeddings, random streams). Global torch stays untouched; nothing happens where CUDA exists.
"""

import importlib.abc
import importlib.machinery
import logging
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

_PACKAGE = "megatron.core"
_CPU = torch.device("cpu")
_FACTORIES = ("zeros", "ones", "empty", "tensor", "full", "arange", "rand", "randn")


class _CudaOnCpu(types.ModuleType):
    """Stands for `torch.cuda` where there is none."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")
        self.random = types.SimpleNamespace(get_rng_state=lambda device="cuda": torch.get_rng_state())

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def current_device() -> torch.device:
        return _CPU

    @staticmethod
    def synchronize(*_: object) -> None:
        """The CPU has no queue to wait for."""

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    @staticmethod
    def get_rng_state(*_: object, **__: object) -> torch.Tensor:
        return torch.get_rng_state()


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return create


class _TorchOnCpu(types.ModuleType):
    """Stands for `torch` inside megatron-core."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CudaOnCpu()
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _PatchingFinder(importlib.abc.MetaPathFinder):
    """Gives the stand-in to megatron-core modules that are imported later."""

    def __init__(self, proxy: types.ModuleType) -> None:
        self.proxy = proxy

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(_PACKAGE + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        loader = spec.loader if spec is not None else None
        if spec is None or not isinstance(loader, importlib.machinery.SourceFileLoader):
            return spec
        execute = loader.exec_module

        def execute_and_patch(module: types.ModuleType) -> None:
            execute(module)
            _patch(module, self.proxy)

        loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec


def _patch(module: types.ModuleType, proxy: types.ModuleType) -> None:
    if getattr(module, "torch", None) is torch:
        module.torch = proxy  # type: ignore[attr-defined]


def install_cpu_backend() -> None:
    """Let megatron-core run on the CPU. Does nothing where CUDA is available, or when called again."""
    if torch.cuda.is_available() or any(isinstance(finder, _PatchingFinder) for finder in sys.meta_path):
        return
    import megatron.core.tensor_parallel.random as random_streams

    proxy = _TorchOnCpu()
    sys.meta_path.insert(0, _PatchingFinder(proxy))
    for name, module in list(sys.modules.items()):
        if name.startswith(_PACKAGE):
            _patch(module, proxy)
    random_streams._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random_streams._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    # It warns that the CPU's state changes inside a CUDA stream; here they are one and the same.
    logging.getLogger(random_streams.__name__).setLevel(logging.ERROR)


def unpatched_modules() -> list[str]:
    """Return the loaded megatron-core modules that still see the real torch (none after `install_cpu_backend`)."""
    return [
        name
        for name, module in sys.modules.items()
        if name.startswith(_PACKAGE) and getattr(module, "torch", None) is torch
    ]
