"""The optimizer: DeepSpeed's ZeRO over megatron-core's schedule, and what must happen to gradients in between."""
