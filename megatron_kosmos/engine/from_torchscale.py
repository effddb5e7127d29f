"""From a Kosmos-X state dict, torchscale's decoder with its vision side, to a run that training starts from."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor

from megatron_kosmos import __version__
from megatron_kosmos.checkpoint.load import StoredTensors
from megatron_kosmos.config import PerceiverConfig, RunConfig, load_config, save_config
from megatron_kosmos.engine.checkpointing import MODEL_PREFIX
from megatron_kosmos.engine.conversion import (
    MAX_ABS_LOGIT_DIFF,
    ConversionError,
    ConversionReport,
    new_folder,
    refuse_existing,
)
from megatron_kosmos.engine.imported_run import CONFIG_FILE, write_initial_checkpoint
from megatron_kosmos.engine.torchscale_reference import torchscale_logits
from megatron_kosmos.engine.verify_conversion import largest_difference, training_logits, verification_batch
from megatron_kosmos.hf.export_folder import kosmos_config
from megatron_kosmos.hf.name_map import Entry, Shape, check_names, name_table
from megatron_kosmos.hf.torchscale_names import FRAMES, differences, normalized, places


@dataclass(frozen=True)
class TorchscaleOptions:
    """What a state dict does not say, and how to convert it."""

    torchscale_config: Path
    """JSON with the keyword arguments of torchscale's DecoderConfig."""
    config: Path
    """YAML of the run to make; its section `model` has the sizes of tower and resampler, too."""
    verify: bool = True
    """Compare the logits with Kosmos-X's, and put nothing in place that differs."""
    overwrite: bool = False
    """Replace an output folder that exists."""


def from_torchscale(source: Path, output: Path, options: TorchscaleOptions) -> ConversionReport:
    """Make the new run folder `output`, with a checkpoint at step 0, from a state dict that torch.save wrote.

    Only tensors are read from the file, never objects. Raises ConversionError (no such file, another network than in
    `options.config`, models that differ, output there already), NameMapError (tensors that don't fit), ConfigError.
    """
    refuse_existing(output, options.overwrite, source)
    run = load_config(options.config).model_copy(update={"run_dir": output})
    _check_settings(run, options)
    tensors = normalized(_read_state_dict(source), run.model.decoder.tie_embeddings)
    table = name_table(kosmos_config(run.model, None), run.model.decoder.padded_vocab_size)
    num_frames = len(tensors[FRAMES]) if FRAMES in tensors and tensors[FRAMES].dim() else 1
    expected = {place.name: place.shape for entry in table for place in places(entry, num_frames)}
    found: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_names(expected, found, str(source))
    with new_folder(output, options.overwrite) as writing:
        checkpoint = write_initial_checkpoint(writing, run, _joined(table, tensors, num_frames))
        save_config(run, writing / CONFIG_FILE)
        difference = None
        if options.verify:
            # What was just written needs no check of its checksums: every byte takes part in the logits.
            stored = StoredTensors(checkpoint, contents=False)
            original = torchscale_logits(run.model, tensors, verification_batch(run.model))
            converted = training_logits(run, lambda name: stored.read(MODEL_PREFIX + name))
            difference = largest_difference(original, converted)
        report = ConversionReport(
            source=str(source),
            step=0,
            num_parameters=sum(torch.Size(shape).numel() for entry in table for shape in entry.hf_shapes),
            dtype="float32",
            max_abs_logit_diff=difference,
            bound=MAX_ABS_LOGIT_DIFF,
            code_version=__version__,
        )
        report.check()
        report.write(writing)
    return report


def _check_settings(run: RunConfig, options: TorchscaleOptions) -> None:
    """Raise ConversionError where the JSON and the YAML describe different decoders."""
    path = options.torchscale_config
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"--torchscale-config {path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise ConversionError(f"--torchscale-config {path} must be an object with DecoderConfig's arguments")
    problems = differences(settings, run.model.decoder)
    if not isinstance(run.model.resampler, PerceiverConfig) or run.model.vision.features != "hidden":
        problems.append(
            "Kosmos-X has a perceiver on hidden features: set model.resampler.kind and model.vision.features"
        )
    if run.model.decoder.num_query_groups is not None or run.model.decoder.query_key_norm:
        problems.append("torchscale has neither model.decoder.num_query_groups nor query_key_norm")
    if run.model.decoder.positions == "sinusoidal":
        problems.append("torchscale's position embeddings are learned: model.decoder.positions is sinusoidal")
    if problems:
        raise ConversionError(f"{path} and {options.config} describe different networks:\n  " + "\n  ".join(problems))


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ConversionError(f"{path} is not a file; give the state dict that torch.save wrote")
    try:
        # mmap leaves in the file what is not asked for; files older than torch 1.6 can't be mapped.
        state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise ConversionError(
            f"{path} is not a file of tensors alone, so it is not read: {str(error).splitlines()[0]}. "
            f"Save model.state_dict() with torch.save"
        ) from error
    is_named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not is_named or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ConversionError(f"{path} holds more than tensors by name; save model.state_dict() alone")
    return state


def _joined(table: tuple[Entry, ...], tensors: dict[str, Tensor], num_frames: int) -> Iterator[tuple[str, Tensor]]:
    for entry in table:
        parts = (place.take(tensors[place.name]) for place in places(entry, num_frames))
        yield entry.training_name, entry.join(*parts)
