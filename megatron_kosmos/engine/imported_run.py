"""The run that a conversion from elsewhere makes: its configuration, and a checkpoint of weights before the first step.

The checkpoint has masters alone, so `kosmos train` finds every weight newly trained and starts AdamW from zero; and it
is at step 0, so the data begins at its first sample, whatever the data is.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import XLMRobertaTokenizer

from megatron_kosmos import __version__
from megatron_kosmos.checkpoint.folders import CHECKPOINTS, complete_folder
from megatron_kosmos.checkpoint.load import StoredTensors
from megatron_kosmos.checkpoint.write_tensors import TensorWriter
from megatron_kosmos.config import RunConfig, load_config, parse_config, save_config
from megatron_kosmos.data.errors import DataError
from megatron_kosmos.data.tokenization.making import import_tokenizer
from megatron_kosmos.data.tokenization.settings import SETTINGS_FILE
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from megatron_kosmos.engine.checkpointing import MODEL_PREFIX
from megatron_kosmos.engine.conversion import MAX_FILE_BYTES, ConversionError, ConversionReport
from megatron_kosmos.engine.resumption import differing_fields
from megatron_kosmos.engine.verify_conversion import largest_difference, training_logits
from megatron_kosmos.hf.name_map import Entry
from megatron_kosmos.prompt import END_OF_IMAGE, IMAGE, LINE

CONFIG_FILE = "config.yaml"
TOKENIZER_FOLDER = "tokenizer"
XLM_ROBERTA_FILE = "sentencepiece.bpe.model"
TOKENIZER_FILES = (SETTINGS_FILE, XLM_ROBERTA_FILE, "tokenizer.json")
"""Of a Hugging Face folder, in the order in which they are looked for."""

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "training": {"steps": 10_000, "micro_batch_size": 1, "global_batch_size": 64},
    "optimizer": {"learning_rate": 2.0e-5, "warmup_steps": 375},
}
"""Where no configuration is given: a start to be edited. The peak rate is a tenth of pre-training's."""


def run_of(model: Mapping[str, Any], output: Path, config: Path | None) -> RunConfig:
    """Return the configuration of a run in `output` whose network is the section `model`.

    `config` names a YAML with the run's settings, whose own section `model` must describe the same network; None takes
    `SETTINGS`, and corpora that are places to fill. Raises ConversionError with the fields that differ, ConfigError.
    """
    length = model["decoder"]["max_sequence_length"]
    corpora = [{"kind": "text", "prefix": "data/text"}, {"kind": "caption", "prefix": "data/captions"}]
    data = {"tokenizer": str(output / TOKENIZER_FOLDER), "sequence_length": length, "train": corpora}
    start = {"run_dir": str(output), "model": model, "data": data, **SETTINGS}
    if config is None:
        return parse_config(start, "the source's configuration")
    run = load_config(config).model_copy(update={"run_dir": output})
    decoder = {**model["decoder"], "vocab_multiple": run.model.decoder.vocab_multiple}
    theirs = parse_config(start | {"model": {**model, "decoder": decoder}}, "the source's configuration").model
    fields = differing_fields(theirs.model_dump(mode="json"), run.model.model_dump(mode="json"))
    if fields:
        lines = [f"{name}: {source} in the source, {here} in {config}" for name, source, here in fields]
        raise ConversionError(f"{config} describes another network than the source:\n  " + "\n  ".join(lines))
    return run


def write_run(
    folder: Path,
    run: RunConfig,
    source: Path,
    table: tuple[Entry, ...],
    parts_of: Callable[[Entry], Iterable[Tensor]],
    original_logits: Callable[[], Tensor] | None,
) -> ConversionReport:
    """Write the configuration of a run that has not begun, its checkpoint, and the report, which is returned.

    `parts_of` reads an entry's exported tensors from `source`. `original_logits` gives its model's logits on
    `verification_batch`; None compares nothing. Raises ConversionError where the models differ.
    """
    save_config(run, folder / CONFIG_FILE)
    checkpoint = complete_folder(folder / CHECKPOINTS, 0)
    checkpoint.mkdir(parents=True)
    writer = TensorWriter(checkpoint, MAX_FILE_BYTES)
    for entry in table:
        weight = entry.join(*parts_of(entry))
        writer.add(MODEL_PREFIX + entry.training_name, weight.to(torch.float32).contiguous())
    state = {"config": run.model_dump(mode="json"), "data": None, "step": 0, "updates": 0, "version": __version__}
    writer.close(0, state)
    difference = None
    if original_logits is not None:
        # What was just written needs no check of its checksums: every byte takes part in the logits.
        stored = StoredTensors(checkpoint, contents=False)
        converted = training_logits(run, lambda name: stored.read(MODEL_PREFIX + name))
        difference = largest_difference(original_logits(), converted)
    report = ConversionReport(
        source=str(source),
        step=0,
        num_parameters=sum(math.prod(shape) for entry in table for shape in entry.hf_shapes),
        dtype="float32",
        max_abs_logit_diff=difference,
    )
    report.check()
    report.write(folder)
    return report


def take_tokenizer(source: Path, run_dir: Path, vocab_size: int) -> str | None:
    """Put the tokenizer of a Hugging Face folder into the run's; return why not, if it could not be taken."""
    file = next((name for name in TOKENIZER_FILES if (source / name).is_file()), None)
    if file is None:
        return f"{source} has none of {', '.join(TOKENIZER_FILES)}"
    try:
        tokenizer = _xlm_roberta(source / file) if file == XLM_ROBERTA_FILE else _own(source, file)
    except DataError as error:
        return str(error)
    if tokenizer.vocab_size > vocab_size:
        return (
            f"with the markers of pictures that it lacks, the tokenizer in {source} has {tokenizer.vocab_size} ids, "
            f"the model {vocab_size}"
        )
    tokenizer.save(run_dir / TOKENIZER_FOLDER)
    return None


def _own(source: Path, file: str) -> KosmosTokenizer:
    return KosmosTokenizer.load(source) if file == SETTINGS_FILE else import_tokenizer(source / file)


def _xlm_roberta(file: Path) -> KosmosTokenizer:
    """Return a sentencepiece model with the tokens and ids that transformers adds to it in this folder (Kosmos-2's)."""
    imported = import_tokenizer(file, newlines="line")
    names = XLMRobertaTokenizer.from_pretrained(file.parent).get_added_vocab()
    if not {IMAGE, END_OF_IMAGE, LINE} <= names.keys():
        return imported
    size = max(names.values()) + 1
    settings = imported.settings.model_copy(update={"vocab_size": size, "special_tokens": names})
    return KosmosTokenizer(file.read_bytes(), settings, str(file))
