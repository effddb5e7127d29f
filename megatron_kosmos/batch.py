"""The one contract between data and model: a microbatch of packed sequences with images spliced in.

Shape letters: B sequences, T tokens, I images, S image side in pixels, L latents (slots) of an image.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class MultimodalBatch:
    """One microbatch of one data-parallel rank, as far as the rank needs it.

    Tokens are with the ranks that hold the embedding or the loss, images with those that hold the vision tower, a share
    with each tensor-parallel one. The rest is metadata, which all ranks have. A batch without images is a normal one:
    `images` is then `[0, 3, S, S]` and `image_positions` `[0, 2]`.
    """

    input_ids: Tensor
    """[B, T] int64. An image's L slots hold the padding id; the model overwrites their embeddings. [B, 0] on ranks that
    hold neither the embedding nor the loss."""
    labels: Tensor
    """[B, T] int64. The id that follows each position; meaningless where `loss_mask` is false. [B, 0] as above."""
    loss_mask: Tensor
    """[B, T] bool. True where the label is a text token or the end of a document, not on image tokens and padding."""
    position_ids: Tensor
    """[B, T] int64. Positions within the sequence, or within the document under `data.document_mask`."""
    document_starts: Tensor
    """[N + 1] int32, on the host. Where each of the N segments that attention stays within begins, counted over the
    rows laid end to end, and B * T at last (flash-attn's cu_seqlens). Plain packing has one segment a row."""
    images: Tensor
    """[J, 3, S, S] float32, normalized as CLIP wants them: this tensor-parallel rank's share of the I images, as
    `share_of_images` cuts them. J = I where there is one such rank, J = 0 on ranks that hold no vision tower."""
    image_positions: Tensor
    """[I, 2] int64. Row and column of each image's first slot; its slots are the L columns from there."""
    sources: Tensor
    """[B] int64. Index into `prompt.SOURCE_KINDS` of the corpus that each sequence comes from."""

    @classmethod
    def of_prompts(cls, input_ids: Tensor, images: Tensor, image_positions: Tensor) -> "MultimodalBatch":
        """Return a batch without targets, a document in each row, to get a model's logits of."""
        return cls(
            input_ids=input_ids,
            labels=torch.zeros_like(input_ids),
            loss_mask=torch.zeros_like(input_ids, dtype=torch.bool),
            position_ids=torch.arange(input_ids.shape[1]).repeat(len(input_ids), 1),
            document_starts=row_starts(*input_ids.shape),
            images=images,
            image_positions=image_positions,
            sources=torch.zeros(len(input_ids), dtype=torch.int64),
        )

    def for_tensor_rank(self, tp_rank: int, tp_size: int) -> "MultimodalBatch":
        """Return a batch that holds all I images with the share of one tensor-parallel rank."""
        return replace(self, images=self.images[share_of_images(len(self.images), tp_rank, tp_size)])

    @property
    def masks_documents(self) -> bool:
        """Whether attention stays within segments that are shorter than the rows."""
        return len(self.document_starts) > len(self.input_ids) + 1

    @property
    def num_target_tokens(self) -> int:
        """Positions that count in the loss."""
        return int(self.loss_mask.sum())

    @property
    def num_attention_pairs(self) -> int:
        """Pairs of a query and a key at or before it in the same segment."""
        lengths = self.document_starts.long().diff()
        return int((lengths * (lengths + 1)).sum()) // 2

    def slots(self, num_latents: int) -> Tensor:
        """Return [B, T] bool, true on the `num_latents` slots of each image."""
        slots = torch.zeros_like(self.loss_mask)
        for row, column in self.image_positions.tolist():
            slots[row, column : column + num_latents] = True
        return slots

    def to(self, device: torch.device) -> "MultimodalBatch":
        """Return the batch with every tensor but `document_starts` on `device`."""
        moved = {field.name: getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)}
        return MultimodalBatch(**(moved | {"document_starts": self.document_starts}))


def images_a_rank(num_images: int, tp_size: int) -> int:
    """Return how many images a tensor-parallel rank computes on: as many on each, at least one, blank ones included."""
    return max(1, -(-num_images // tp_size))


def share_of_images(num_images: int, tp_rank: int, tp_size: int) -> slice:
    """Return which of a microbatch's images are a tensor-parallel rank's; the last ranks may have fewer, or none."""
    each = images_a_rank(num_images, tp_size)
    return slice(tp_rank * each, (tp_rank + 1) * each)


def row_starts(num_rows: int, length: int) -> Tensor:
    """Return the `document_starts` of plain packing: every row is one segment."""
    return torch.arange(0, (num_rows + 1) * length, length, dtype=torch.int32)
