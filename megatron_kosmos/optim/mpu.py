"""megatron-core's process groups in the words that DeepSpeed asks for."""

import torch.distributed as dist
from megatron.core import parallel_state


class ModelParallelUnit:
    """DeepSpeed's `mpu`. There is no `initialize_sequence_parallel` here: DeepSpeed would take it for Ulysses."""

    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_src_rank = staticmethod(parallel_state.get_tensor_model_parallel_src_rank)
    get_pipeline_model_parallel_group = staticmethod(parallel_state.get_pipeline_model_parallel_group)
    get_pipeline_model_parallel_rank = staticmethod(parallel_state.get_pipeline_model_parallel_rank)
    get_pipeline_model_parallel_world_size = staticmethod(parallel_state.get_pipeline_model_parallel_world_size)
    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)

    @staticmethod
    def get_model_parallel_group() -> dist.ProcessGroup:
        """Tensor and pipeline ranks of this copy of the model, over which DeepSpeed sums the gradient norm."""
        return parallel_state.get_model_parallel_group()

    @staticmethod
    def get_model_parallel_world_size() -> int:
        """Number of ranks in the model-parallel group."""
        return dist.get_world_size(parallel_state.get_model_parallel_group())

    @staticmethod
    def get_model_parallel_rank() -> int:
        """Rank in the model-parallel group, unique over tensor and pipeline."""
        return dist.get_rank(parallel_state.get_model_parallel_group())
