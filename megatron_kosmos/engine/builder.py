"""The composition root: from a configuration and a topology to the parts of a training run."""

from dataclasses import dataclass

from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_kosmos.config import RunConfig
from megatron_kosmos.model.initialization import initialize
from megatron_kosmos.model.kosmos import KosmosModel
from megatron_kosmos.model.magneto import transformer_config
from megatron_kosmos.model.names import TIED_EMBEDDING, NamedParameter, named_parameters
from megatron_kosmos.optim.zero import ZeroOptimizer
from megatron_kosmos.parallel.stages import balance_layers, chunks_of_stage
from megatron_kosmos.parallel.topology import Topology


@dataclass(frozen=True)
class Stage:
    """The part of the model that this rank holds, and its optimizer."""

    chunks: tuple[KosmosModel, ...]
    transformer: TransformerConfig
    optimizer: ZeroOptimizer

    @property
    def named(self) -> list[NamedParameter]:
        """Every parameter of this rank under its global name, the tied copy included."""
        return [named for chunk in self.chunks for named in named_parameters(chunk)]


def build_stage(run: RunConfig, topology: Topology) -> Stage:
    """Build, initialize and wrap what this rank trains."""
    transformer = derive_transformer_config(run)
    chunks = build_chunks(run, transformer, topology)
    for chunk in chunks:
        initialize(chunk, run.training.seed)
        chunk.to(topology.device)
    names = {named.parameter: named.name for chunk in chunks for named in named_parameters(chunk)}
    optimizer = ZeroOptimizer(chunks, names, _tied_weight(names), run, topology)
    return Stage(chunks, transformer, optimizer)


def build_chunks(run: RunConfig, transformer: TransformerConfig, topology: Topology) -> tuple[KosmosModel, ...]:
    """Build the chunks of this rank's stage with weights allocated but not set."""
    # Registers the random stream that tensor-parallel modules ask for; seed_microbatch sets it before each use.
    model_parallel_cuda_manual_seed(run.training.seed)
    layers = decoder_layers_of_chunks(run)
    return tuple(
        KosmosModel(run.model, transformer, chunk, topology)
        for chunk in chunks_of_stage(layers, topology.pp_rank, topology.pp_size)
    )


def derive_transformer_config(run: RunConfig) -> TransformerConfig:
    """Derive megatron-core's configuration of the decoder."""
    return transformer_config(run.model.decoder, run.parallel, run.training, decoder_layers_of_chunks(run))


def decoder_layers_of_chunks(run: RunConfig) -> tuple[int, ...]:
    """Return the decoder layers of every chunk in model order: as configured, or balanced by counted cost."""
    if run.parallel.chunk_layers is not None:
        return run.parallel.chunk_layers
    return balance_layers(run.model.decoder.num_layers, run.parallel.num_chunks, *_end_costs(run))


def _end_costs(run: RunConfig) -> tuple[float, float]:
    """Return the forward cost of the vision side and of the vocabulary projection, in decoder layers, a sequence.

    Multiplications only; captions are taken to fill a sequence with an image every 2 L tokens, interleaved documents
    with one every 4 L.
    """
    decoder, vision, resampler = run.model.decoder, run.model.vision, run.model.resampler
    length = run.data.sequence_length
    layer = length * (4 * decoder.width**2 + 2 * decoder.width * decoder.ffn_width + length * decoder.width)
    vision_layer = vision.num_patches * (4 * vision.width**2 + 2 * vision.width * vision.ffn_width)
    inner = resampler.num_heads * resampler.head_size
    features = vision.num_patches + resampler.num_latents
    resampler_layer = 2 * features * vision.width * inner + 2 * resampler.num_latents * vision.width * (
        inner + resampler.ffn_multiplier * vision.width
    )
    image = vision.num_layers * vision_layer + resampler.depth * resampler_layer
    weights = {kind: 0.0 for kind in ("text", "caption", "interleaved")}
    for corpus in run.data.train:
        weights[corpus.kind] += corpus.weight
    images_per_token = (weights["caption"] / 2 + weights["interleaved"] / 4) / resampler.num_latents
    num_images = length * images_per_token / sum(weights.values())
    return num_images * image / layer, length * decoder.width * decoder.padded_vocab_size / layer


def _tied_weight(names: dict[nn.Parameter, str]) -> nn.Parameter | None:
    return next((parameter for parameter, name in names.items() if name == TIED_EMBEDDING), None)
