"""From a training checkpoint to a folder that transformers loads, gated by a comparison of both models' logits."""

import json
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from transformers import Kosmos2Config, PreTrainedTokenizerBase

from megatron_kosmos.checkpoint.load import StoredTensors, read_state
from megatron_kosmos.config import RunConfig, parse_config
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from megatron_kosmos.engine.checkpointing import MODEL_PREFIX
from megatron_kosmos.engine.conversion import (
    MAX_FILE_BYTES,
    ConversionError,
    ConversionReport,
    new_folder,
    refuse_existing,
)
from megatron_kosmos.engine.inspect_checkpoint import open_checkpoint
from megatron_kosmos.engine.verify_conversion import hf_logits, largest_difference, training_logits
from megatron_kosmos.hf.export_folder import kosmos_config, write_folder, write_kosmos2_folder
from megatron_kosmos.hf.folder_weights import FolderWeights
from megatron_kosmos.hf.formats import Format, HFConfig, table_of
from megatron_kosmos.hf.kosmos2 import kosmos2_config
from megatron_kosmos.hf.load_tokenizer import stock_tokenizer, training_tokenizer
from megatron_kosmos.hf.model_card import CardFacts, model_card
from megatron_kosmos.hf.name_map import Entry, check_names
from megatron_kosmos.hf.shards import ShardWriter


@dataclass(frozen=True)
class ExportOptions:
    """How to export."""

    format: Format = "kosmos"
    """Our class, which holds every model, or transformers' Kosmos2ForConditionalGeneration."""
    tokenizer: Path | None = None
    """Tokenizer folder; None takes the one that the run's configuration names."""
    verify: bool = True
    """Compare the logits of both models, and put nothing in place that differs."""
    overwrite: bool = False
    """Replace an output folder that exists."""
    max_shard_bytes: int = MAX_FILE_BYTES


def to_hf(source: Path, output: Path, options: ExportOptions = ExportOptions()) -> ConversionReport:
    """Export a checkpoint folder, or a run's newest checkpoint, to the new folder `output`.

    The folder is written beside its place and renamed last. Raises ConversionError (output there
    already, models that differ), FormatError (a model that the format cannot hold), NameMapError (tensors that don't
    fit), CheckpointError and DataError.
    """
    refuse_existing(output, options.overwrite, source)
    stored = open_checkpoint(source, contents=True)
    state = read_state(stored.folder)
    run = parse_config(state["config"], f"{stored.folder}/state.json")
    load_tokenizer = stock_tokenizer if options.format == "kosmos2" else training_tokenizer
    tokenizer_folder = options.tokenizer or run.data.tokenizer
    refuse_existing(output, options.overwrite, stored.folder, tokenizer_folder)
    tokenizer = load_tokenizer(find_tokenizer(tokenizer_folder, run))
    with new_folder(output, options.overwrite) as writing:
        report = _Export(stored, run, writing, options).write(tokenizer)
        report.check()
    return report


class _Export:
    """One export on its way: from the checkpoint `stored` to the folder `writing`."""

    def __init__(self, stored: StoredTensors, run: RunConfig, writing: Path, options: ExportOptions) -> None:
        self.stored, self.run, self.writing, self.options = stored, run, writing, options

    def write(self, tokenizer: PreTrainedTokenizerBase) -> ConversionReport:
        """Write every file and return the report."""
        translate = kosmos2_config if self.options.format == "kosmos2" else kosmos_config
        config: HFConfig = translate(self.run.model, tokenizer)
        table = table_of(config, self.run.model.decoder.padded_vocab_size)
        checkpoint, step = self.stored.folder, self.stored.manifest.step
        weights = {
            name.removeprefix(MODEL_PREFIX): shape
            for name, shape in self.stored.shapes.items()
            if name.startswith(MODEL_PREFIX)
        }
        check_names({entry.training_name: entry.training_shape for entry in table}, weights, str(checkpoint))
        parameters, dtype = self._stream_weights(table)
        self._write_folder(config, dtype, tokenizer)
        difference = self._compare(config) if self.options.verify else None
        report = ConversionReport(
            source=str(checkpoint),
            step=step,
            num_parameters=sum(parameters.values()),
            dtype=str(dtype).removeprefix("torch."),
            max_abs_logit_diff=difference,
        )
        metrics = last_metrics(checkpoint.absolute().parent.parent / "metrics.jsonl", report.step)
        card = model_card(self.run, config, CardFacts(report.step, parameters, metrics, difference))
        (self.writing / "README.md").write_text(card, encoding="utf-8")
        report.write(self.writing)
        return report

    def _stream_weights(self, table: tuple[Entry, ...]) -> tuple[dict[str, int], torch.dtype]:
        """Write the weights; return the parameters of each part and their dtype."""
        writer = ShardWriter(self.writing, self.options.max_shard_bytes)
        parameters: Counter[str] = Counter()
        dtypes = set()
        for entry in table:
            tensor = self.stored.read(MODEL_PREFIX + entry.training_name)
            for hf_name, part in zip(entry.hf_names, entry.split(tensor), strict=True):
                writer.add(hf_name, part)
                parameters[hf_name.partition(".")[0].replace("_", " ")] += part.numel()
            dtypes.add(tensor.dtype)
        writer.close()
        return dict(parameters), reduce(torch.promote_types, dtypes)

    def _write_folder(self, config: HFConfig, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write everything of the folder but its weights."""
        config.dtype = config.vision_config.dtype = dtype
        if isinstance(config, Kosmos2Config):
            config.text_config.dtype = dtype
            write_kosmos2_folder(self.writing, config, self.run.model, tokenizer)
        else:
            write_folder(self.writing, config, self.run.model, tokenizer)

    def _compare(self, config: HFConfig) -> float:
        """Return the largest difference of the logits of the checkpoint and of the files that were written."""
        expected = training_logits(self.run, lambda name: self.stored.read(MODEL_PREFIX + name))
        exported = FolderWeights(self.writing)
        return largest_difference(hf_logits(config, exported.read, self.run.model), expected)


def last_metrics(path: Path, step: int) -> dict[str, Any]:
    """Return the latest value of every metric that `path` has up to `step`; empty if there is no such file.

    A line that is none, such as the last one of a run that was killed, is passed over.
    """
    latest: dict[str, Any] = {}
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                with suppress(ValueError, KeyError, TypeError):
                    values = json.loads(line)
                    if values["step"] <= step:
                        latest |= {name: value for name, value in values.items() if value is not None}
    return latest


def find_tokenizer(folder: Path, run: RunConfig) -> Path:
    """Return `folder`. Raises DataError where it is no tokenizer, ConversionError where it is not one of `run`'s."""
    tokenizer = KosmosTokenizer.load(folder)  # checks the files
    if tokenizer.vocab_size > run.model.decoder.vocab_size:
        raise ConversionError(
            f"the tokenizer {folder} has {tokenizer.vocab_size} ids, the model vocab_size="
            f"{run.model.decoder.vocab_size}: it is not the one of this run"
        )
    return folder
