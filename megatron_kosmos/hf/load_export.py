"""Reading an exported folder back, whole or not at all, without running code of the folder."""

from pathlib import Path

from transformers import GenerationConfig

from megatron_kosmos.hf.configuration_kosmos import KosmosConfig
from megatron_kosmos.hf.folder_weights import FolderError, FolderWeights
from megatron_kosmos.hf.formats import CONFIG_FILE, read_config
from megatron_kosmos.hf.load_tokenizer import exported_tokenizer
from megatron_kosmos.hf.modeling_kosmos import KosmosForConditionalGeneration
from megatron_kosmos.hf.processing_kosmos import KosmosImageProcessor, KosmosProcessor

BROKEN = (OSError, KeyError, RuntimeError, TypeError, ValueError)
"""What transformers, tokenizers and sentencepiece raise for files that are missing or damaged."""


def load_export(folder: Path) -> tuple[KosmosForConditionalGeneration, KosmosProcessor]:
    """Return the model of `folder`, in the precision of its weights, on the CPU, and its processor.

    Raises FolderError when the folder is no export, is of transformers' own Kosmos-2, or when a file or a weight is
    missing, damaged or of another shape: transformers would only warn of some, and go on with random weights.
    """
    if not folder.is_dir():
        raise FolderError(f"there is no folder {folder}")
    if not (folder / CONFIG_FILE).is_file():
        raise FolderError(
            f"{folder} is no exported model; make one with `kosmos convert to-hf RUN_OR_CHECKPOINT {folder}`"
        )
    try:
        config = read_config(folder)
    except BROKEN as error:
        raise FolderError(f"{folder / CONFIG_FILE} does not load: {error}") from error
    if not isinstance(config, KosmosConfig):
        raise FolderError(
            f"{folder} is transformers' own {config.model_type}, which its README.md says how to use; export without "
            f"--format kosmos2 to generate with it here"
        )
    FolderWeights(folder)
    return _load_model(folder, config), _load_processor(folder, config)


def _load_model(folder: Path, config: KosmosConfig) -> KosmosForConditionalGeneration:
    try:
        GenerationConfig.from_pretrained(folder)
        model, loaded = KosmosForConditionalGeneration.from_pretrained(
            folder, config=config, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    except BROKEN as error:
        raise FolderError(f"{folder} does not load: {error}") from error
    wrong = [f"{name} is missing" for name in sorted(loaded["missing_keys"])]
    wrong += [f"{name} is {list(here)}, not {list(there)}" for name, here, there in sorted(loaded["mismatched_keys"])]
    wrong += [f"{name} is left over" for name in sorted(loaded["unexpected_keys"])]
    if wrong:
        raise FolderError(f"the weights of {folder} do not fit its {CONFIG_FILE}: {'; '.join(wrong)}. Export it again")
    return model


def _load_processor(folder: Path, config: KosmosConfig) -> KosmosProcessor:
    try:
        images, tokenizer = KosmosImageProcessor.from_pretrained(folder), exported_tokenizer(folder)
    except BROKEN as error:
        raise FolderError(f"the processor of {folder} does not load: {error}. Export it again") from error
    return KosmosProcessor(images, tokenizer, config.num_image_tokens)


__all__ = ["load_export"]
