"""Models without memory for their weights, which are read module by module while the model computes.

A conversion compares two models this way on a machine that could hold neither.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ReadTensor = Callable[[str], Tensor]
"""A weight by its name, on any device and in any floating-point dtype."""


@contextmanager
def weights_without_memory() -> Iterator[None]:
    """Build modules whose parameters have shapes but no memory. Buffers, tables of positions above all, are real."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def stream_weights(
    model: nn.Module,
    names: Mapping[nn.Parameter, str],
    read: ReadTensor,
    device: torch.device,
    keep: Collection[str] = (),
) -> None:
    """Let every module of `model` read its own weights in fp32 when it is called and forget them when it returns.

    `names` has the name of every parameter of the model. `keep` names the weights that stay once they are read,
    because another module takes them, too. Forward only.
    """
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        if own:
            loan = _Loan(module, {leaf: names[parameter] for leaf, parameter in own.items()}, read, device, keep)
            module.register_forward_pre_hook(loan.take)
            module.register_forward_hook(loan.give_back)


class _Loan:
    """The weights that a module has while it is called."""

    def __init__(
        self, module: nn.Module, names: Mapping[str, str], read: ReadTensor, device: torch.device, keep: Collection[str]
    ) -> None:
        self.names, self.read, self.device, self.keep = names, read, device, keep
        self.empty = {leaf: getattr(module, leaf) for leaf in names}

    def take(self, module: nn.Module, *_: Any) -> None:
        for leaf, name in self.names.items():
            expected = self.empty[leaf].shape
            tensor = self.read(name).to(self.device, torch.float32)
            if tensor.shape != expected:
                raise ValueError(f"{name} is {list(tensor.shape)}, the model wants {list(expected)}")
            setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))

    def give_back(self, module: nn.Module, *_: Any) -> None:
        for leaf, name in self.names.items():
            if name not in self.keep:
                setattr(module, leaf, self.empty[leaf])


def buffers_to(model: nn.Module, device: torch.device) -> None:
    """Move buffers alone, in place: parameters without memory can't be moved."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
