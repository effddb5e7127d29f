"""What is checked of a run before anything is loaded or started: no torch, no process group, a second at most."""

from megatron_kosmos.config import ConfigError, RunConfig
from megatron_kosmos.data.corpora.corpus import data_fingerprint
from megatron_kosmos.data.loading.heldout_split import refuse_overlap
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from megatron_kosmos.observability.trackers import check_trackers_installed
from megatron_kosmos.optim.installed import check_installed


def check_before_start(run: RunConfig, world_size: int) -> None:
    """Refuse what cannot run before any process group starts.

    Raises ConfigError for a layout or batch that `world_size` doesn't fit, an optimizer or a tracker whose library is
    missing, a vocabulary smaller than the tokenizer's and a prompt that leaves no room for captions, DataError for a
    tokenizer or corpora that aren't there or don't belong together.
    """
    run.data_parallel_size(world_size)
    check_installed(run.optimizer)
    check_trackers_installed(run.logging)
    tokenizer = KosmosTokenizer.load(run.data.tokenizer)
    if tokenizer.vocab_size > run.model.decoder.vocab_size:
        raise ConfigError(
            f"model.decoder.vocab_size={run.model.decoder.vocab_size} is smaller than the vocabulary of "
            f"data.tokenizer={run.data.tokenizer}, which has {tokenizer.vocab_size} tokens; set it to at least that"
        )
    _check_caption_prompt(run, tokenizer)
    data_fingerprint(run.data)
    refuse_overlap(run.data)


def _check_caption_prompt(run: RunConfig, tokenizer: KosmosTokenizer) -> None:
    """Refuse a prompt that fills the sequence in which held-out pictures are captioned."""
    num_prompt = len(tokenizer.encode(run.evaluation.caption_prompt))
    num_before = 3 + run.model.resampler.num_latents  # <s> <image> … </image>
    if num_before + num_prompt >= run.data.sequence_length:
        raise ConfigError(
            f"evaluation.caption_prompt is {num_prompt} tokens long; with the {num_before} of a picture before it, no "
            f"room is left for a caption in data.sequence_length={run.data.sequence_length}; shorten it"
        )
