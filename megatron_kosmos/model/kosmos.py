"""KOSMOS-1 (arXiv 2302.14045): what one pipeline stage, or one interleaved chunk of it, holds and computes.

Shape letters: B batch, T tokens, D decoder width, I images, L latents, V vocabulary.
"""

import torch
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_kosmos.batch import MultimodalBatch
from megatron_kosmos.config import CrossAttentionConfig, ModelConfig
from megatron_kosmos.model.cached_tokens import CachedTokens
from megatron_kosmos.model.cross_attention import CrossAttentionResampler
from megatron_kosmos.model.documents import segments_of
from megatron_kosmos.model.embedding import SplicedEmbedding
from megatron_kosmos.model.loss import OutputLayer, TokenLosses
from megatron_kosmos.model.magneto import decoder_submodules
from megatron_kosmos.model.recomputation import DecoderBlock
from megatron_kosmos.model.resampler import PerceiverResampler
from megatron_kosmos.model.vision import VisionTower
from megatron_kosmos.parallel.images import fill_up, gather_image_embeddings
from megatron_kosmos.parallel.stages import Chunk
from megatron_kosmos.parallel.topology import Topology


class KosmosModel(MegatronModule):
    """One chunk of the model.

    The first chunk turns a batch into hidden states, vision side included; the last one turns hidden states into the
    loss of every position; in between, and across ranks, only hidden states [T, B, D] travel.
    """

    model_type = ModelType.encoder_or_decoder
    """What megatron-core's schedules ask: one hidden state goes from stage to stage."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, chunk: Chunk, topology: Topology) -> None:
        super().__init__(config)
        self.model_config, self.chunk, self.topology = model, chunk, topology
        self.trains_below = True
        """Whether a chunk before this one holds a trained weight; set by what knows the whole model."""
        self.vp_stage = chunk.virtual_index if topology.virtual_size > 1 else None  # megatron-core's schedule reads it
        tied = model.decoder.tie_embeddings
        if chunk.is_first:
            self.vision_tower = VisionTower(model.vision).to(config.params_dtype)
            self.resampler = _resampler(model).to(config.params_dtype)
            for parameter in (*self.vision_tower.parameters(), *self.resampler.parameters()):
                parameter.sees_image_shard = True
            self.embedding = SplicedEmbedding(model.decoder, config)
        self.decoder = DecoderBlock(
            config,
            decoder_submodules(model.decoder, chunk.num_layers),
            pre_process=chunk.is_first,
            post_process=chunk.is_last,
            vp_stage=self.vp_stage,
        )
        if chunk.is_last:
            self.output_layer = OutputLayer(model.decoder, config, owns_weight=not (tied and chunk.is_first))
            if tied and not chunk.is_first:
                # The second copy of the tied matrix: its gradient joins the first's, and norms count it once.
                self.output_layer.weight.is_tied_copy = True
                self.output_layer.weight.ds_pipe_replicated = True
        _mark_shards(self)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Take the hidden states [T, B, D] of the previous stage (called by megatron-core's schedule)."""
        hidden_TBD = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if hidden_TBD is not None and hidden_TBD.requires_grad and not self.trains_below:
            # No autograd below the lowest trained weight; the schedule still sends a gradient back, and finds zeros.
            hidden_TBD.grad = torch.zeros_like(hidden_TBD)
            hidden_TBD = hidden_TBD.detach()
        self.decoder.set_input_tensor(hidden_TBD)

    def forward(self, batch: MultimodalBatch, logits_of: slice | None = None) -> Tensor | TokenLosses:
        """Return hidden states [T, B, D] to send on; on the last chunk the losses of the batch's targets.

        With `logits_of`, positions of T, the last chunk returns their logits [B, T', V] of the existing ids, gathered
        from the tensor ranks.
        """
        hidden_TBD = self._decode(batch)
        if not self.chunk.is_last:
            return hidden_TBD
        if logits_of is not None:
            return self.gathered_logits(hidden_TBD, logits_of)
        targets = batch.labels, batch.loss_mask
        losses: TokenLosses = self.output_layer(hidden_TBD, self._tied_weight(), targets=targets)
        return losses

    def logits(self, batch: MultimodalBatch) -> Tensor:
        """Return the logits [B, T, V] of a model that this rank's stage holds whole."""
        logits: Tensor = self(batch, logits_of=slice(None))
        return logits

    def decode(self, hidden_BTD: Tensor, tokens: CachedTokens) -> Tensor:
        """Return the last hidden states [T, B, D] of a call's embedded tokens, images spliced in.

        For a model that this rank's stage holds whole. Raises ValueError, on all tensor-parallel ranks alike, for a
        position that training has no place for.
        """
        longest, last = self.model_config.decoder.max_sequence_length, int(tokens.position_ids.max())
        if last >= longest:
            raise ValueError(
                f"position {last} is behind the model's last, {longest - 1}; shorten the prompt or max_new_tokens"
            )
        hidden_TBD = self.embedding.add_positions(hidden_BTD, tokens.position_ids)
        hidden_TBD = self.decoder(hidden_TBD, attention_mask=None, packed_seq_params=tokens)
        return hidden_TBD

    def gathered_logits(self, hidden_TBD: Tensor, columns: slice = slice(None)) -> Tensor:
        """Return the logits [B, T', V] of positions `columns` and existing ids, the same on all tensor-parallel ranks.

        Gathered from them.
        """
        logits_TBV = self.output_layer(hidden_TBD, self._tied_weight(), columns=columns)
        if self.topology.tp_size > 1:
            logits_TBV = gather_from_tensor_model_parallel_region(logits_TBV)
        return logits_TBV.transpose(0, 1)[..., : self.model_config.decoder.vocab_size]

    def _tied_weight(self) -> Tensor | None:
        """Return the embedding's matrix where the output projection has none of its own."""
        is_shared = self.model_config.decoder.tie_embeddings and self.chunk.is_first
        return self.embedding.word_embeddings.weight if is_shared else None

    def embed_images(self, images: Tensor, num_images: int) -> Tensor:
        """Return embeddings [I', L, D] of I images, this tensor rank's share of which are `images` [J, 3, S, S].

        I' ≥ I: blank ones fill up the shares.
        """
        shard = fill_up(images.to(self.config.params_dtype), num_images, self.topology.tp_group)
        return gather_image_embeddings(self.resampler(self.vision_tower(shard)), self.topology.tp_group)

    def _decode(self, batch: MultimodalBatch) -> Tensor:
        hidden_TBD = None
        if self.chunk.is_first:
            images_ILD = self.embed_images(batch.images, len(batch.image_positions))
            hidden_TBD = self.embedding(batch.input_ids, batch.position_ids, images_ILD, batch.image_positions)
        segments = segments_of(batch, batch.input_ids.device)
        return self.decoder(hidden_TBD, attention_mask=None, packed_seq_params=segments)


def _resampler(model: ModelConfig) -> nn.Module:
    """Return the configured kind of resampler, from features [I, P, E] to image embeddings [I, L, D]."""
    config, widths = model.resampler, (model.vision.width, model.decoder.width)
    if isinstance(config, CrossAttentionConfig):
        return CrossAttentionResampler(config, *widths)
    return PerceiverResampler(config, *widths)


def _mark_shards(model: nn.Module) -> None:
    """Mark where tensor parallelism cuts each weight; megatron-core does so only while it initializes them."""
    for module in model.modules():
        cuts: list[tuple[nn.Parameter | None, int]] = []
        if isinstance(module, VocabParallelEmbedding):
            cuts = [(module.weight, 0)]
        elif isinstance(module, ColumnParallelLinear):
            cuts = [(module.weight, 0), (module.bias, 0)]
        elif isinstance(module, RowParallelLinear):
            cuts = [(module.weight, 1)]
        for parameter, dim in cuts:
            if parameter is not None:
                parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
                parameter.partition_dim = dim  # type: ignore[attr-defined]
                parameter.partition_stride = 1  # type: ignore[attr-defined]
