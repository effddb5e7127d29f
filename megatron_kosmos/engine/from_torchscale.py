"""From a Kosmos-X state dict, torchscale's decoder with its vision side, to a run that training starts from."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor

from megatron_kosmos.config import PerceiverConfig, RunConfig, load_config
from megatron_kosmos.engine.conversion import ConversionError, ConversionReport, new_folder, refuse_existing
from megatron_kosmos.engine.imported_run import write_run
from megatron_kosmos.engine.torchscale_reference import torchscale_logits
from megatron_kosmos.engine.verify_conversion import verification_batch
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

    def parts_of(entry: Entry) -> Iterable[Tensor]:
        return (place.take(tensors[place.name]) for place in places(entry, num_frames))

    with new_folder(output, options.overwrite) as writing:
        batch = verification_batch(run.model)
        original = partial(torchscale_logits, run.model, tensors, batch) if options.verify else None
        return write_run(writing, run, source, table, parts_of, original)


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
