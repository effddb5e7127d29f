"""A parameter's fp32 master and Adam moments, whole, wherever ZeRO has put their pieces.

Reading is a collective over the data-parallel ranks and gives each of them, or one, the whole tensor: go parameter by
parameter, and keep what is needed. Writing gives each rank its pieces without communication.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from torch import Tensor, nn

from megatron_kosmos.optim.adamw import MOMENTS, moments_of
from megatron_kosmos.parallel.topology import Topology

MASTER = "master"


@dataclass(frozen=True)
class Fragment:
    """The piece of a parameter that this data rank updates."""

    flat: Tensor
    """The tensor that AdamW updates: the parameter itself, or under ZeRO a partition with pieces of many of them."""
    start: int
    """Where the piece begins in `flat`."""
    offset: int
    """Where it begins in the flattened parameter."""
    length: int

    def of(self, whole: Tensor) -> Tensor:
        """Return the piece of `whole`, which has the parameter's shape."""
        return whole.flatten()[self.offset : self.offset + self.length]


@dataclass(frozen=True)
class Owner:
    """The data rank that a parameter's state is read on."""

    rank: int
    has_all: bool
    """Whether ZeRO keeps the whole of it there, so that nothing has to be sent."""


class OptimizerState:
    """Access to what AdamW under ZeRO keeps for each trained parameter of this rank."""

    def __init__(self, adamw: torch.optim.Optimizer, optimizer: Any, stage: int, topology: Topology) -> None:
        """Create zero moments for `adamw`, wrapped by DeepSpeed's `optimizer` at ZeRO `stage`.

        They would be made at the first step; made here, a checkpoint can be read into them.
        """
        self.stage, self.topology, self._optimizer, self._moments = stage, topology, optimizer, moments_of(adamw)
        self._flats: list[Tensor] = []
        for flat, group in self._flat_partitions(adamw):
            self._flats.append(flat)
            self._moments.create(flat, group)

    @property
    def updates(self) -> int:
        """Updates that AdamW has made, which its bias correction counts. Fewer than steps where steps were skipped."""
        return self._moments.updates(self._flats[0]) if self._flats else 0

    def set_updates(self, updates: int) -> None:
        """Let AdamW count from `updates`."""
        for flat in self._flats:
            self._moments.set_updates(flat, updates)

    def shape_of(self, parameter: Any) -> torch.Size:
        """Return a parameter's shape, which ZeRO 3 takes from the parameter itself: this tensor rank's part of it."""
        shape: torch.Size = parameter.ds_shape if self.stage == 3 else parameter.shape
        return shape

    def read(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return {"master", "exp_avg", "exp_avg_sq"} of a trained parameter in fp32: this tensor rank's part of it.

        Not to be changed: where nothing is cut it is what the optimizer works with.
        """
        fragment = self._fragment(parameter)
        return {name: self._whole(parameter, name, fragment) for name in (MASTER, *MOMENTS)}

    def owners(self, parameters: Sequence[nn.Parameter]) -> list[Owner | None]:
        """Choose the data rank to read each trained parameter on; None where every rank has all of it.

        The rank that ZeRO keeps it on, or if it is cut the one with the least so far. All-gather over the data group.
        """
        if self.stage == 0 or self.topology.dp_size == 1:
            return [None] * len(parameters)
        fragments = [self._fragment(parameter) for parameter in parameters]
        lengths = torch.tensor([fragment.length if fragment else 0 for fragment in fragments], dtype=torch.int64)
        lengths = lengths.to(self.topology.device)
        of_ranks = [torch.empty_like(lengths) for _ in range(self.topology.dp_size)]
        dist.all_gather(of_ranks, lengths, group=self.topology.dp_group)
        longest, holders = (of_parameters.tolist() for of_parameters in torch.stack(of_ranks).max(0))
        sizes = [self.shape_of(parameter).numel() for parameter in parameters]
        owners: list[Owner | None] = [
            Owner(rank, True) if length == size else None
            for rank, length, size in zip(holders, longest, sizes, strict=True)
        ]
        load = [0] * len(of_ranks)
        for owner, size in zip(owners, sizes, strict=True):
            if owner is not None:
                load[owner.rank] += size
        for number, size in enumerate(sizes):
            if owners[number] is None:
                rank = load.index(min(load))
                owners[number] = Owner(rank, False)
                load[rank] += size
        return owners

    def read_on(self, owner: Owner, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return what `read` does on the data rank `owner`, {} elsewhere. Reduce over the data group if it is cut."""
        fragment, is_owner = self._fragment(parameter), owner.rank == self.topology.dp_rank
        state = {}
        for name in (MASTER, *MOMENTS):
            if owner.has_all and is_owner:
                assert fragment is not None
                state[name] = self._piece(name, fragment).view(self.shape_of(parameter))
            elif not owner.has_all:
                state[name] = self._piece_in_zeros(parameter, name, fragment)
                dist.reduce(state[name], group_dst=owner.rank, group=self.topology.dp_group)
        return state if is_owner else {}

    def frozen_weight(self, parameter: nn.Parameter) -> Tensor:
        """Return an untrained parameter, which has neither master nor moments."""
        if self.stage < 3:
            return parameter.detach()
        with GatheredParameters([parameter]):
            return parameter.detach().clone()

    def write(self, tensors: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        """Set masters and moments of trained parameters from whole tensors on any device.

        All at once, since pieces of several parameters may share a block of 8-bit moments. What `tensors` leaves out
        stays as it is, and so does the weight that the model computes with.
        """
        pieces: dict[Tensor, list[tuple[Fragment, Mapping[str, Tensor]]]] = defaultdict(list)
        for parameter, given in tensors.items():
            fragment = self._fragment(parameter)
            if fragment is not None:
                pieces[fragment.flat].append((fragment, given))
        for flat, pieces_of_flat in pieces.items():
            if self.stage > 0:
                _fill(flat.detach(), MASTER, pieces_of_flat)
            for name in MOMENTS:
                with self._moments.opened(flat, name) as moment:
                    _fill(moment, name, pieces_of_flat)

    def _whole(self, parameter: Any, name: str, fragment: Fragment | None) -> Tensor:
        """Put the data ranks' pieces together. All-reduce over the data group; none where each has all."""
        if self.stage == 0 or self.topology.dp_size == 1:
            assert fragment is not None
            return self._piece(name, fragment).view(self.shape_of(parameter))
        whole = self._piece_in_zeros(parameter, name, fragment)
        dist.all_reduce(whole, group=self.topology.dp_group)
        return whole

    def _piece_in_zeros(self, parameter: Any, name: str, fragment: Fragment | None) -> Tensor:
        """Return a tensor of the parameter's shape with what this rank has of it, and zeros."""
        whole = torch.zeros(self.shape_of(parameter), dtype=torch.float32, device=self.topology.device)
        if fragment is not None:
            fragment.of(whole).copy_(self._piece(name, fragment))
        return whole

    def _piece(self, name: str, fragment: Fragment) -> Tensor:
        if name == MASTER:
            return fragment.flat.detach().view(-1).narrow(0, fragment.start, fragment.length)
        return self._moments.read(fragment.flat, name, fragment.start, fragment.length)

    def _fragment(self, parameter: Any) -> Fragment | None:
        """Find this rank's piece of a parameter where DeepSpeed has put it; None where it has none."""
        if self.stage == 0:
            return Fragment(parameter, 0, 0, parameter.numel())
        if self.stage == 3:
            number, start, length = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
            offset = self.topology.dp_rank * length  # the last pieces are padded
            length = min(length, parameter.ds_numel - offset)
            return Fragment(self._flats[number], start, offset, length) if length > 0 else None
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        piece, place = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Fragment(self._flats[mapping.param_group_index], piece.start, place.start, piece.numel)

    def _flat_partitions(self, adamw: torch.optim.Optimizer) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Yield the tensors that AdamW itself updates, with their groups."""
        if self.stage == 3:
            groups = self._optimizer.sub_group_to_group_id
            for number, flat in enumerate(self._optimizer.fp32_partitioned_groups_flat):
                yield flat, adamw.param_groups[groups[number]]
        else:
            for group in adamw.param_groups:
                for flat in group["params"]:
                    yield flat, group


def _fill(flat: Tensor, name: str, pieces: list[tuple[Fragment, Mapping[str, Tensor]]]) -> None:
    for fragment, given in pieces:
        if name in given:
            flat.view(-1).narrow(0, fragment.start, fragment.length).copy_(fragment.of(given[name]))
