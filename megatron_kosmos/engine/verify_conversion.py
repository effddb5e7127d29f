"""The gate of a conversion: the logits of both models on fixed inputs with images, neither of them in memory whole.

Shape letters: B rows, T tokens, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Kosmos2Config

from megatron_kosmos.batch import MultimodalBatch
from megatron_kosmos.config import ModelConfig, ParallelConfig, RunConfig
from megatron_kosmos.engine.builder import build_chunks, derive_transformer_config
from megatron_kosmos.engine.streaming import ReadTensor, buffers_to, stream_weights, weights_without_memory
from megatron_kosmos.hf.formats import HFConfig, build_model
from megatron_kosmos.hf.kosmos2 import FIRST_ROW
from megatron_kosmos.model.kosmos import KosmosModel
from megatron_kosmos.model.names import TIED_EMBEDDING, named_parameters
from megatron_kosmos.parallel.topology import build_topology, start_process_group, stop_process_group

TEXT_TOKENS = 16
"""Text of a verification row, at most."""
FIRST_TOKEN = 7
"""Ids before it mean something to one model or the other: padding above all."""


@contextmanager
def training_model(run: RunConfig) -> Iterator[tuple[KosmosModel, torch.device]]:
    """Build the whole training model of `run` in this process, fp32, without dropout, its weights without memory.

    Yields it with the device that it computes on. Raises RuntimeError where a process group runs already:
    megatron-core's groups are one to a process.
    """
    if dist.is_initialized():
        raise RuntimeError("verification builds the training model in a process group of its own; one runs already")
    try:
        device = start_process_group(rank=0, world_size=1, local_rank=0)
        alone = run.model_copy(
            update={
                "parallel": ParallelConfig(),
                "training": run.training.model_copy(update={"precision": "fp32", "recompute": "none"}),
            }
        )
        topology = build_topology(alone.parallel, device)
        with weights_without_memory():
            (model,) = build_chunks(alone, derive_transformer_config(alone), topology)
        yield model.eval(), device
    finally:
        stop_process_group()


@torch.no_grad()
def training_logits(run: RunConfig, read: ReadTensor) -> Tensor:
    """Return the logits [B, T, V], on the CPU, of the training model whose weights `read` gives by global name."""
    with training_model(run) as (model, device):
        names = {named.parameter: named.name for named in named_parameters(model)}
        keep = [TIED_EMBEDDING] if run.model.decoder.tie_embeddings else []
        stream_weights(model, names, read, device, keep)
        buffers_to(model, device)
        return model.logits(verification_batch(run.model).to(device)).cpu()


@torch.no_grad()
def hf_logits(config: HFConfig, read: ReadTensor, model: ModelConfig) -> Tensor:
    """Return the logits [B, T, V] of the Hugging Face model of `config` whose weights `read` gives by name."""
    with weights_without_memory():
        exported = build_model(config).eval()
    stream_weights(exported, {one: name for name, one in exported.named_parameters()}, read, torch.device("cpu"))
    batch = verification_batch(model)
    # Left to itself, transformers' Kosmos-2 would count positions by the ids, the slots' ids too.
    first = FIRST_ROW if isinstance(config, Kosmos2Config) else 0
    logits: Tensor = exported(
        input_ids=batch.input_ids,
        pixel_values=batch.images,
        image_embeds_position_mask=batch.slots(model.resampler.num_latents),
        position_ids=batch.position_ids + first,
        use_cache=False,
    ).logits
    return logits


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Return the largest absolute difference of two models' logits; NaN where either has one."""
    return float(torch.stack([(a - b).abs().max() for a, b in zip(one, other, strict=True)]).max())


def verification_batch(model: ModelConfig) -> MultimodalBatch:
    """Return two fixed rows, of text alone and with two images (or as many as fit) and text."""
    num_latents, side = model.resampler.num_latents, model.vision.image_size
    longest = model.decoder.max_sequence_length
    most_images = min(2, longest // (num_latents + 2))
    num_tokens = min(longest, most_images * (num_latents + 2) + TEXT_TOKENS)
    images_of_rows = [0, most_images]
    generator = torch.Generator().manual_seed(0)
    shape = (len(images_of_rows), num_tokens)
    positions = [
        (row, 1 + image * (num_latents + 2)) for row, count in enumerate(images_of_rows) for image in range(count)
    ]
    lowest = min(FIRST_TOKEN, model.decoder.vocab_size - 1)
    return MultimodalBatch.of_prompts(
        input_ids=torch.randint(lowest, model.decoder.vocab_size, shape, generator=generator),
        images=torch.randn(len(positions), 3, side, side, generator=generator),
        image_positions=torch.tensor(positions),
    )
