"""Generation straight from a training checkpoint: every process of the group is a tensor-parallel rank of the model.

The ranks run the same search in step. Each keeps keys and values of its own heads; logits are gathered, the same to the
bit on all of them, so all choose the same tokens and nothing but the model's own collectives is sent.

Shape letters: B rows, T tokens of this call, D decoder width, I images, S image side, L latents, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from megatron_kosmos.batch import share_of_images
from megatron_kosmos.checkpoint.errors import CheckpointError
from megatron_kosmos.checkpoint.folders import CHECKPOINTS
from megatron_kosmos.checkpoint.load import find_latest, load_checkpoint, read_state
from megatron_kosmos.checkpoint.manifest import MANIFEST_FILE
from megatron_kosmos.checkpoint.mesh import CheckpointMesh
from megatron_kosmos.checkpoint.tensors import TensorShard
from megatron_kosmos.config import ConfigError, ParallelConfig, RunConfig, parse_config
from megatron_kosmos.engine.builder import build_chunks, derive_transformer_config
from megatron_kosmos.engine.checkpointing import MODEL_PREFIX, checkpoint_mesh
from megatron_kosmos.engine.conversion import ConversionError
from megatron_kosmos.engine.convert import find_tokenizer
from megatron_kosmos.engine.sampling import GenerationError
from megatron_kosmos.hf import KosmosConfig, KosmosForConditionalGeneration, KosmosProcessor
from megatron_kosmos.hf.export_folder import generation_config, kosmos_config, kosmos_processor
from megatron_kosmos.hf.load_tokenizer import training_tokenizer
from megatron_kosmos.model.cached_tokens import CachedTokens
from megatron_kosmos.model.kosmos import KosmosModel
from megatron_kosmos.model.names import named_parameters
from megatron_kosmos.parallel.agreement import agree, is_shared
from megatron_kosmos.parallel.topology import Topology, build_topology, start_process_group


class EndedTogether(GenerationError):
    """What ended one rank, or several, raised on all of them."""


class _Decoder(nn.Module):
    """Stands where an exported model has its embedding and layers."""

    trained: KosmosModel

    def __init__(self, config: KosmosConfig, trained: KosmosModel) -> None:
        super().__init__()
        self.config, self.trained = config, trained

    def embed_tokens(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings [B, T, D] of ids [B, T]."""
        embeddings: Tensor = self.trained.embedding.word_embeddings(input_ids)
        return embeddings

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None, position_ids: Tensor, cache: Cache | None, **_: Any
    ) -> Tensor:
        """As `KosmosDecoder.forward`."""
        is_visible = create_causal_mask(self.config, inputs_embeds, attention_mask, cache)
        tokens = CachedTokens(position_ids=position_ids, is_visible=is_visible, cache=cache)
        return self.trained.decode(inputs_embeds, tokens).transpose(0, 1)


class _TextModel(nn.Module):
    """Stands where an exported model has its decoder and output projection."""

    model: _Decoder

    def __init__(self, config: KosmosConfig, trained: KosmosModel) -> None:
        super().__init__()
        self.model = _Decoder(config, trained)

    def lm_head(self, hidden_BTD: Tensor) -> Tensor:
        """Return the logits [B, T, V]."""
        return self.model.trained.gathered_logits(hidden_BTD.transpose(0, 1).contiguous())


class ParallelKosmos(KosmosForConditionalGeneration):
    """The exported model's interface and generation over a training model, which does the mathematics.

    Every call is a collective over the tensor-parallel ranks, which must make the same calls. A cache holds the heads
    of its rank alone.
    """

    text_model: _TextModel  # type: ignore[assignment] # what is called of it is the same

    def __init__(self, config: KosmosConfig, trained: KosmosModel) -> None:
        """`trained` holds this rank's shard of the whole model; `config` describes it to transformers."""
        super(KosmosForConditionalGeneration, self).__init__(config)  # without the weights that an exported model has
        self.text_model = _TextModel(config, trained)
        self.generation_config = generation_config(config)

    @property
    def trained(self) -> KosmosModel:
        """The training model."""
        return self.text_model.model.trained

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Return the embeddings [I, L, D] of images [I, 3, S, S], which the tensor-parallel ranks share out."""
        topology, num_images = self.trained.topology, len(pixel_values)
        share = pixel_values[share_of_images(num_images, topology.tp_rank, topology.tp_size)]
        return self.trained.embed_images(share, num_images)[:num_images]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does, on all ranks alike.

        Raises EndedTogether where a rank has ended with an error, or was given something else than the others.
        """
        stay_in_step(_bytes_of(kwargs), self.device)
        return super().generate(*args, **kwargs)


def load_trained(source: Path, tokenizer: Path | None = None) -> tuple[ParallelKosmos, KosmosProcessor]:
    """Load a checkpoint's weights, or those of a run's newest one, in the run's precision, without optimizer state.

    A collective: all ranks of the running process group become tensor-parallel ranks, whatever layout the checkpoint
    was saved under, and each holds its shard only, on its current device. A process without a group starts one of its
    own, which stays until `parallel.topology.stop_process_group`. `tokenizer`: its folder, None takes the one that the
    run's configuration names.

    Raises GenerationError on every rank alike: where there is no checkpoint, it is damaged or doesn't fit, the model
    can't be cut so, or its tokenizer isn't there.
    """
    local_rank = torch.cuda.current_device() if torch.cuda.is_available() else 0
    device = start_process_group(rank=0, world_size=1, local_rank=local_rank)  # the group that runs, if one does
    topology = build_topology(ParallelConfig(tensor_parallel_size=dist.get_world_size()), device)
    try:
        return _load(source, topology, tokenizer)
    except ConversionError as error:
        alone = "" if topology.tp_size == 1 else "; an exported model generates in one process, without torchrun"
        raise GenerationError(f"{error}{alone}") from error
    except CheckpointError as error:
        raise GenerationError(str(error)) from error


def _load(source: Path, topology: Topology, tokenizer: Path | None) -> tuple[ParallelKosmos, KosmosProcessor]:
    mesh, device = checkpoint_mesh(topology), topology.device
    folder = _find_checkpoint(source, mesh)
    with ending_together(device):
        run = _on_these_ranks(read_state(folder)["config"], f"{folder}/state.json", topology.tp_size)
        prompt_tokenizer = training_tokenizer(find_tokenizer(tokenizer or run.data.tokenizer, run))
    (trained,) = build_chunks(run, derive_transformer_config(run), topology)
    shards = [
        TensorShard(MODEL_PREFIX + one.name, one.parameter.detach(), one.shard_dim) for one in named_parameters(trained)
    ]
    # A run's newest checkpoint has just been read through, to know that it is whole.
    load_checkpoint(folder, shards, mesh, prefix=MODEL_PREFIX, contents=folder == source)
    model = ParallelKosmos(kosmos_config(run.model, prompt_tokenizer), trained.to(device))
    return model, kosmos_processor(run.model, prompt_tokenizer)


def _find_checkpoint(source: Path, mesh: CheckpointMesh) -> Path:
    """Return the checkpoint that `source` means: itself, or the newest whole one of a run's folder.

    A collective over `mesh.group`. Raises ConversionError on every rank alike where there is none.
    """
    ((is_checkpoint, is_run), *_) = mesh.agree(
        f"looking for a checkpoint at {source}",
        lambda: ((source / MANIFEST_FILE).is_file(), (source / CHECKPOINTS).is_dir()),
    )
    if is_checkpoint:
        return source
    newest = find_latest(source / CHECKPOINTS if is_run else source, mesh)
    if newest is None:
        raise ConversionError(f"no whole checkpoint at {source}; give a run's folder or one of its checkpoints/step_*")
    return newest


def stay_in_step(content: bytes, device: torch.device, failure: str | None = None) -> None:
    """Meet the other ranks, where all of them do the same with the same `content` or one ends with a `failure`.

    A collective over all ranks. Raises EndedTogether on all of them where one has a failure or other content.
    """
    if dist.get_world_size() == 1:
        if failure is not None:
            raise EndedTogether(failure)
        return
    message = agree(failure, is_asked_to_stop=False, device=device).failure
    if message is not None:
        raise EndedTogether(message)
    if not is_shared(content, device):
        raise EndedTogether(
            "the processes were given different prompts, pictures or settings; all of them must see the same files"
        )


@contextmanager
def ending_together(device: torch.device) -> Iterator[None]:
    """Raise EndedTogether on every rank when one ends in an error that a user can mend. Meets all ranks at the end."""
    failure = None
    try:
        yield
    except EndedTogether:
        raise
    except (ValueError, OSError, CheckpointError) as error:
        failure = str(error)
    stay_in_step(b"done", device, failure)


def _on_these_ranks(config: Any, origin: str, num_ranks: int) -> RunConfig:
    """Return a run's configuration for so many tensor-parallel ranks. Raises ConfigError where they can't cut it."""

    def cut_into(size: int) -> RunConfig:
        training = {**config.get("training", {}), "recompute": "none"}
        return parse_config({**config, "training": training, "parallel": {"tensor_parallel_size": size}}, origin)

    alone = cut_into(1)
    try:
        return cut_into(num_ranks)
    except ConfigError as error:
        sizes = range(1, alone.model.decoder.num_heads + 1)
        legal = ", ".join(str(size) for size in sizes if _is_legal(cut_into, size))
        raise ConfigError(f"{num_ranks} processes can't share this model, start {legal} of them. {error}") from error


def _is_legal(cut_into: Callable[[int], RunConfig], size: int) -> bool:
    try:
        cut_into(size)
    except ConfigError:
        return False
    return True


def _bytes_of(inputs: Mapping[str, Any]) -> bytes:
    """Return what tells one call of generation from another."""
    parts = []
    for name, value in sorted(inputs.items()):
        if isinstance(value, Tensor):
            content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            parts.append(f"{name} {list(value.shape)} ".encode() + content)
        elif value is None or isinstance(value, bool | int | float | str):
            parts.append(f"{name} {value!r} ".encode())
    return b"".join(parts)
