"""The gate of a conversion: the training model and the exported one, side by side on fixed inputs with images."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kosmos.batch import MultimodalBatch
from megatron_kosmos.config import ModelConfig, ParallelConfig, RunConfig
from megatron_kosmos.engine.builder import build_chunks, derive_transformer_config
from megatron_kosmos.hf import KosmosForConditionalGeneration
from megatron_kosmos.model.kosmos import KosmosModel
from megatron_kosmos.model.names import named_parameters
from megatron_kosmos.parallel.topology import build_topology, start_process_group, stop_process_group

TEXT_TOKENS = 48
"""Text of a verification row, at most."""


@contextmanager
def training_model(run: RunConfig) -> Iterator[KosmosModel]:
    """Build the whole training model of `run` in this process, fp32, without dropout, its weights not set.

    Raises RuntimeError where a process group runs already: megatron-core's groups are one to a process.
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
        (model,) = build_chunks(alone, derive_transformer_config(alone), topology)
        yield model.to(device).eval()
    finally:
        stop_process_group()


def parameters_by_name(model: KosmosModel) -> Mapping[str, Tensor]:
    """Return the tensors to fill, under their global names."""
    return {named.name: named.parameter.detach() for named in named_parameters(model)}


@torch.no_grad()
def largest_logit_difference(model: KosmosModel, run: RunConfig, folder: Path) -> float:
    """Return the largest absolute difference of the logits of `model` and of the export in `folder`, in fp32."""
    exported = KosmosForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    device = next(model.parameters()).device
    batch = verification_batch(run.model).to(device)
    expected = model.logits(batch)
    logits = exported.to(device)(
        batch.input_ids,
        pixel_values=batch.images,
        image_embeds_position_mask=batch.slots(run.model.resampler.num_latents),
        use_cache=False,
    ).logits
    return float((logits - expected).abs().max())


def verification_batch(model: ModelConfig) -> MultimodalBatch:
    """Return three fixed rows, of text alone, with one image and with two (or as many as fit)."""
    num_latents, side = model.resampler.num_latents, model.vision.image_size
    longest = model.decoder.max_sequence_length
    most_images = min(2, longest // (num_latents + 2))
    num_tokens = min(longest, most_images * (num_latents + 2) + TEXT_TOKENS)
    images_of_rows = [0, 1, most_images]
    generator = torch.Generator().manual_seed(0)
    shape = (len(images_of_rows), num_tokens)
    positions = [
        (row, 1 + image * (num_latents + 2)) for row, count in enumerate(images_of_rows) for image in range(count)
    ]
    return MultimodalBatch.of_prompts(
        input_ids=torch.randint(0, model.decoder.vocab_size, shape, generator=generator),
        images=torch.randn(len(positions), 3, side, side, generator=generator),
        image_positions=torch.tensor(positions),
    )
