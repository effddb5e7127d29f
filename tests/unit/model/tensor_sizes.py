"""Sees how large tensors get while something is computed."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class TensorSizes(TorchDispatchMode):
    """Keeps the number of elements of every tensor that an operation inside it returns, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, and look at the result."""
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple) else (result,)
        self.sizes.extend(x.numel() for x in results if isinstance(x, Tensor))
        return result
