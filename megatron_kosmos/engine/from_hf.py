"""From a folder of transformers, an own export or a stock Kosmos-2, to a run that training starts from."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_kosmos.engine.conversion import ConversionError, ConversionReport, new_folder, refuse_existing
from megatron_kosmos.engine.imported_run import CONFIG_FILE, run_of, take_tokenizer, write_run
from megatron_kosmos.engine.verify_conversion import hf_logits
from megatron_kosmos.hf.folder_weights import FolderWeights
from megatron_kosmos.hf.formats import model_settings, read_config, table_of
from megatron_kosmos.hf.name_map import Entry, Shape, check_names

logger = logging.getLogger(__name__)

BUFFER = ".position_ids"
"""What older versions of transformers saved beside the weights: row numbers."""
PRECISIONS = ("F64", "F32", "F16", "BF16")
EMBEDDING, OUTPUT = "text_model.model.embed_tokens.weight", "text_model.lm_head.weight"


@dataclass(frozen=True)
class ImportOptions:
    """How to import."""

    config: Path | None = None
    """YAML with the run's settings; None writes some to begin with."""
    verify: bool = True
    """Compare the logits of both models, and put nothing in place that differs."""
    overwrite: bool = False
    """Replace an output folder that exists."""


def from_hf(source: Path, output: Path, options: ImportOptions = ImportOptions()) -> ConversionReport:
    """Make the new run folder `output`, with a checkpoint at step 0, from a folder of transformers.

    The folder is written beside its place and renamed last. Raises FolderError (no such model, pickled weights),
    FormatError (a Kosmos-2 that can't be trained here), NameMapError (tensors that don't fit), ConversionError (output
    there already, another network than in `options.config`, models that differ), ConfigError and DataError.
    """
    refuse_existing(output, options.overwrite, source)
    config, weights = read_config(source), FolderWeights(source)
    run = run_of(model_settings(config), output, options.config)
    table = table_of(config, run.model.decoder.padded_vocab_size)
    expected = {name: shape for entry in table for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)}
    check_names(expected, _without_surplus(weights, run.model.decoder.tie_embeddings), str(source))
    _check_precision({name: weights.dtypes[name] for name in expected}, source)

    def parts_of(entry: Entry) -> Iterable[Tensor]:
        return map(weights.read, entry.hf_names)

    with new_folder(output, options.overwrite) as writing:
        if options.config is None:
            problem = take_tokenizer(source, writing, run.model.decoder.vocab_size)
            if problem:
                logger.warning("no tokenizer was taken: %s; set data.tokenizer in %s", problem, output / CONFIG_FILE)
        original = partial(hf_logits, config, weights.read, run.model) if options.verify else None
        return write_run(writing, run, source, table, parts_of, original)


def _check_precision(dtypes: Mapping[str, str], source: Path) -> None:
    """Raise ConversionError for quantized weights: their numbers mean something with their scales alone."""
    quantized = [f"{name} is {dtype}" for name, dtype in dtypes.items() if dtype not in PRECISIONS]
    if quantized:
        raise ConversionError(
            f"{source} has weights that are none of {', '.join(PRECISIONS)}; save them dequantized:\n  "
            + "\n  ".join(quantized)
        )


def _without_surplus(weights: FolderWeights, is_tied: bool) -> dict[str, Shape]:
    """Return names and shapes without those that say nothing new: row numbers, and a tied matrix saved twice."""
    surplus = {name for name in weights.shapes if name.endswith(BUFFER)}
    has_both = is_tied and {OUTPUT, EMBEDDING} <= weights.shapes.keys()
    if has_both and torch.equal(weights.read(OUTPUT), weights.read(EMBEDDING)):
        surplus.add(OUTPUT)
    return {name: shape for name, shape in weights.shapes.items() if name not in surplus}
