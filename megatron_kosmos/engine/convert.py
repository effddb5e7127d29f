"""From a training checkpoint to a folder that transformers loads, gated by a comparison of both models' logits."""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_kosmos import __version__
from megatron_kosmos.checkpoint.load import find_latest, read_state, read_tensor_names, read_tensors
from megatron_kosmos.checkpoint.manifest import MANIFEST_FILE, Manifest
from megatron_kosmos.config import RunConfig, parse_config
from megatron_kosmos.data.tokenizer import KosmosTokenizer
from megatron_kosmos.engine.checkpointing import CHECKPOINTS, MODEL_PREFIX
from megatron_kosmos.engine.verify_export import largest_logit_difference, parameters_by_name, training_model
from megatron_kosmos.hf.export_folder import kosmos_config, kosmos_processor, write_folder
from megatron_kosmos.hf.load_tokenizer import training_tokenizer
from megatron_kosmos.hf.model_card import CardFacts, model_card
from megatron_kosmos.hf.name_map import Entry, check_names, name_table
from megatron_kosmos.hf.shards import ShardWriter

logger = logging.getLogger(__name__)

MAX_ABS_LOGIT_DIFF = 1e-4
"""Largest difference in fp32 between the training model's logits and the export's that is taken for rounding."""

REPORT_FILE = "conversion.json"


class ConversionError(ValueError):
    """An export that cannot be made; the message says what, where and what to do."""


@dataclass(frozen=True)
class ExportOptions:
    """How to export."""

    tokenizer: Path | None = None
    """Tokenizer folder; None takes the one that the run's configuration names."""
    verify: bool = True
    """Compare the logits of both models, and put nothing in place that differs."""
    overwrite: bool = False
    """Replace an output folder that exists."""
    max_shard_bytes: int = 1 << 30
    """Largest weight file, which is also about the memory that the export takes besides verification."""


@dataclass(frozen=True)
class ExportReport:
    """What was exported; `conversion.json` in the folder."""

    source: str
    step: int
    num_parameters: int
    dtype: str
    max_abs_logit_diff: float | None
    """None if the export was not verified."""
    bound: float
    code_version: str


def to_hf(source: Path, output: Path, options: ExportOptions = ExportOptions()) -> ExportReport:
    """Export a checkpoint folder, or a run's newest checkpoint, to the new folder `output`.

    The folder is written beside its place and renamed last. Raises ConversionError (nothing to export, output there
    already, models that differ), NameMapError (tensors that don't fit), CheckpointError and DataError.
    """
    if output.exists() and not options.overwrite:
        raise ConversionError(f"{output} exists; choose another folder or pass --overwrite")
    folder = find_checkpoint(source)
    state = read_state(folder)
    run = parse_config(state["config"], f"{folder}/state.json")
    tokenizer_folder = _find_tokenizer(options.tokenizer or run.data.tokenizer, run)
    writing = output.absolute().with_name(f".{output.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    try:
        report = _Export(folder, run, writing, options).write(training_tokenizer(tokenizer_folder))
        _check_difference(report)
        _put_in_place(writing, output)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return report


def find_checkpoint(source: Path) -> Path:
    """Return the checkpoint that `source` means: itself, or the newest whole one of a run's folder."""
    if (source / MANIFEST_FILE).is_file():
        return source
    root = source / CHECKPOINTS if (source / CHECKPOINTS).is_dir() else source
    newest = find_latest(root)
    if newest is None:
        raise ConversionError(f"no whole checkpoint at {source}; give a run's folder or one of its checkpoints/step_*")
    return newest


class _Export:
    """One export on its way: from `checkpoint` to the folder `writing`."""

    def __init__(self, checkpoint: Path, run: RunConfig, writing: Path, options: ExportOptions) -> None:
        self.checkpoint, self.run, self.writing, self.options = checkpoint, run, writing, options

    def write(self, tokenizer: PreTrainedTokenizerBase) -> ExportReport:
        """Write every file and return the report."""
        config = kosmos_config(self.run.model, tokenizer)
        table = name_table(config, self.run.model.decoder.padded_vocab_size)
        stored = {
            name.removeprefix(MODEL_PREFIX): shape
            for name, shape in read_tensor_names(self.checkpoint).items()
            if name.startswith(MODEL_PREFIX)
        }
        check_names({entry.training_name: entry.training_shape for entry in table}, stored, str(self.checkpoint))
        difference = None
        model_or_none: AbstractContextManager[Any] = training_model(self.run) if self.options.verify else nullcontext()
        with model_or_none as model:
            to_fill = parameters_by_name(model) if model is not None else {}
            parameters, config.dtype = self._stream_weights(table, to_fill)
            config.vision_config.dtype = config.dtype
            write_folder(self.writing, config, kosmos_processor(self.run.model, tokenizer))
            if model is not None:
                difference = largest_logit_difference(model, self.run, self.writing)
        report = ExportReport(
            source=str(self.checkpoint),
            step=Manifest.read(self.checkpoint).step,
            num_parameters=sum(parameters.values()),
            dtype=str(config.dtype).removeprefix("torch."),
            max_abs_logit_diff=difference,
            bound=MAX_ABS_LOGIT_DIFF,
            code_version=__version__,
        )
        metrics = last_metrics(self.checkpoint.absolute().parent.parent / "metrics.jsonl", report.step)
        card = model_card(self.run, config, CardFacts(report.step, parameters, metrics, difference))
        (self.writing / "README.md").write_text(card, encoding="utf-8")
        (self.writing / REPORT_FILE).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
        return report

    def _stream_weights(
        self, table: tuple[Entry, ...], to_fill: Mapping[str, Tensor]
    ) -> tuple[dict[str, int], torch.dtype]:
        """Write the weights and fill the training model's; return the parameters of each part and their dtype."""
        entries = {MODEL_PREFIX + entry.training_name: entry for entry in table}
        writer = ShardWriter(self.writing, self.options.max_shard_bytes)
        parameters: Counter[str] = Counter()
        dtypes = set()
        for name, tensor in read_tensors(self.checkpoint, list(entries)):
            entry = entries[name]
            if entry.training_name in to_fill:
                to_fill[entry.training_name].copy_(tensor)
            for hf_name, part in zip(entry.hf_names, entry.split(tensor), strict=True):
                writer.add(hf_name, part)
                parameters[hf_name.partition(".")[0].replace("_", " ")] += part.numel()
            dtypes.add(tensor.dtype)
        writer.close()
        return dict(parameters), reduce(torch.promote_types, dtypes)


def last_metrics(path: Path, step: int) -> dict[str, Any]:
    """Return the latest value of every metric that `path` has up to `step`; empty if there is no such file."""
    latest: dict[str, Any] = {}
    if path.is_file():
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                values = json.loads(line)
                if values["step"] <= step:
                    latest |= {name: value for name, value in values.items() if value is not None}
    return latest


def _put_in_place(writing: Path, output: Path) -> None:
    """Rename `writing` to `output`; what stood there is removed only when the new folder has its place."""
    if not output.exists():
        writing.rename(output)
        return
    replaced = writing.with_suffix(".replaced")
    output.rename(replaced)
    writing.rename(output)
    shutil.rmtree(replaced)


def _check_difference(report: ExportReport) -> None:
    difference = report.max_abs_logit_diff
    if difference is None:
        logger.warning("the export was not compared with the training model")
    elif not difference <= report.bound:  # NaN, too
        raise ConversionError(
            f"the exported model's logits differ from the training model's by {difference:.3g}, more than "
            f"{report.bound:.0e}; nothing was put in place"
        )


def _find_tokenizer(folder: Path, run: RunConfig) -> Path:
    tokenizer = KosmosTokenizer.load(folder)  # checks the files
    if tokenizer.vocab_size > run.model.decoder.vocab_size:
        raise ConversionError(
            f"the tokenizer {folder} has {tokenizer.vocab_size} ids, the model vocab_size="
            f"{run.model.decoder.vocab_size}: it is not the one of this run"
        )
    return folder
