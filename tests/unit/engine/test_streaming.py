"""Models whose weights are read while they compute: the same numbers, one module's weights at a time."""

import pytest
import torch
from torch import Tensor, nn

from megatron_kosmos.engine.streaming import stream_weights, weights_without_memory

WIDTH, DEPTH = 8, 5


class Tied(nn.Module):
    """An embedding that the output projection takes, too, with layers and a buffer between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
        self.register_buffer("scale", torch.full((WIDTH,), 2.0))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids) * self.scale
        for layer in self.layers:
            hidden = layer(hidden).tanh()
        return nn.functional.linear(hidden, self.embedding.weight)


def names_of(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def test_a_streamed_model_computes_what_the_whole_one_does() -> None:
    torch.manual_seed(0)
    whole = Tied()
    with weights_without_memory():
        streamed = Tied()
    assert all(parameter.is_meta for parameter in streamed.parameters())
    reads: list[str] = []
    held: list[int] = []

    def read(name: str) -> Tensor:
        reads.append(name)
        held.append(sum(not parameter.is_meta for parameter in streamed.parameters()))
        return whole.get_parameter(name).detach().double()

    stream_weights(streamed, names_of(streamed), read, torch.device("cpu"), keep=["embedding.weight"])
    ids = torch.arange(6)
    assert torch.equal(streamed(ids), whole(ids))
    assert reads == [name for name, _ in whole.named_parameters()]
    assert max(held) <= 2  # the kept embedding, and the layer's first
    assert [name for name, parameter in streamed.named_parameters() if not parameter.is_meta] == ["embedding.weight"]


def test_a_shape_that_differs_is_named() -> None:
    with weights_without_memory():
        streamed = Tied()
    stream_weights(streamed, names_of(streamed), lambda _: torch.ones(1, WIDTH), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"embedding\.weight is \[1, 8\], the model wants \[11, 8\]"):
        streamed(torch.arange(6))


def test_modules_have_memory_again_afterwards() -> None:
    with pytest.raises(ZeroDivisionError), weights_without_memory():
        raise ZeroDivisionError
    assert not nn.Linear(2, 2).weight.is_meta
