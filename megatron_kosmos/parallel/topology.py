"""This process's place in the tensor x pipeline x data grid, and the groups it talks in."""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_kosmos.config import ParallelConfig
from megatron_kosmos.parallel.cpu_backend import install_cpu_backend


@dataclass(frozen=True)
class Topology:
    """Ranks, sizes and the device of this process. Groups are megatron-core's."""

    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    virtual_size: int
    """Model chunks that this stage holds."""
    device: torch.device

    @property
    def tp_group(self) -> dist.ProcessGroup:
        """Ranks that share every layer of this stage."""
        return parallel_state.get_tensor_model_parallel_group()

    @property
    def pp_group(self) -> dist.ProcessGroup:
        """Ranks that hold the stages of this copy of the model."""
        return parallel_state.get_pipeline_model_parallel_group()

    @property
    def dp_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same weights and see other data."""
        return parallel_state.get_data_parallel_group()

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds embedding, vision tower and resampler."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output projection and computes the loss."""
        return self.pp_rank == self.pp_size - 1

    def describe(self) -> str:
        """Return the place as people write it, for logs and errors."""
        return f"tp{self.tp_rank}/{self.tp_size} pp{self.pp_rank}/{self.pp_size} dp{self.dp_rank}/{self.dp_size}"


def start_process_group(rank: int, world_size: int, local_rank: int, timeout_seconds: int = 600) -> torch.device:
    """Join torch.distributed from the launcher's MASTER_ADDR and MASTER_PORT; return this process's device.

    NCCL on CUDA, gloo on the CPU. A process that is alone needs no launcher.
    """
    install_cpu_backend()
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.HashStore() if world_size == 1 else None,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_seconds),
            device_id=device if device.type == "cuda" else None,
        )
    return device


def build_topology(parallel: ParallelConfig, device: torch.device) -> Topology:
    """Cut the running process group into megatron-core's groups; tensor ranks are neighbours, then data, then pipeline.

    The world size must be a multiple of tensor x pipeline (`RunConfig.data_parallel_size` checks it).
    """
    install_cpu_backend()
    parallel_state.destroy_model_parallel()
    virtual_size = parallel.virtual_pipeline_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_size if virtual_size > 1 else None,
        # A second set of groups, for megatron-core's own checkpoints. Ours are checkpoint/'s.
        create_gloo_process_groups=False,
    )
    return Topology(
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        virtual_size=virtual_size,
        device=device,
    )


def stop_process_group(wait_for_all: bool = False) -> None:
    """Leave the process groups, so that the interpreter can end; with `wait_for_all` not before every rank is here."""
    if wait_for_all:
        dist.barrier()
    parallel_state.destroy_model_parallel()
    # megatron-core forgets this one: a process forked later would wait, in its destructor, for a thread that is gone.
    parallel_state._INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP = None
    if dist.is_initialized():
        dist.destroy_process_group()
