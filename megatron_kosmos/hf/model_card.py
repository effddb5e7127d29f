"""README.md of an exported folder: what the model is, what it was trained on, how far it came, how to use it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import Kosmos2Config

from megatron_kosmos.config import RunConfig
from megatron_kosmos.hf.configuration_kosmos import KosmosConfig
from megatron_kosmos.hf.formats import HFConfig
from megatron_kosmos.hf.kosmos2 import as_kosmos_config
from megatron_kosmos.prompt import CAPTION_PROMPT


@dataclass(frozen=True)
class CardFacts:
    """What a card reports besides the configuration."""

    step: int
    parameters_by_part: Mapping[str, int]
    metrics: Mapping[str, Any]
    """The last line of metrics.jsonl up to `step`; empty if there is none."""
    max_abs_logit_diff: float | None
    """Against the training model, fp32; None if the export was not verified."""


def model_card(run: RunConfig, config: HFConfig, facts: CardFacts) -> str:
    """Return the card as Markdown with the front matter that Hugging Face reads."""
    is_stock = isinstance(config, Kosmos2Config)
    config = as_kosmos_config(config) if isinstance(config, Kosmos2Config) else config
    return _TEMPLATE.format(
        use=(_USE_KOSMOS2 if is_stock else _USE).format(prompt=CAPTION_PROMPT, slots=config.num_image_tokens),
        sizes=_table({**_sizes(config), **_parameters(facts)}),
        data=_table(_data_mix(run)),
        training=_table(_training(run, facts)),
        check=_check(facts),
    )


_USE = """```python
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

folder = "."  # this folder
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(text="{prompt}", images=[Image.open("picture.png")], return_tensors="pt")
tokens = model.generate(**inputs, num_beams=5)
print(processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :])[0])
```

A prompt is `<s> <image> {slots} slots </image> text`; `<image>` in the text says where the next picture goes. There is
no chat format. Batches are padded on the left. `pipeline("image-text-to-text", model=folder, trust_remote_code=True)`
does the same."""

_USE_KOSMOS2 = """```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "."  # this folder
model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
picture = Image.open("picture.png")
inputs = processor(text="{prompt}", images=picture, num_image_tokens={slots}, return_tensors="pt")
tokens = model.generate(**inputs, num_beams=5)
print(processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
```

These are transformers' own classes. Their processor takes one picture a prompt, before the text; there is no chat
format."""

_TEMPLATE = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- kosmos
- multimodal
---

# A KOSMOS-1-style multimodal language model

A causal language model that reads text with pictures spliced in (arXiv 2302.14045), trained with megatron_kosmos.
It is a pre-trained model: it goes on with what it is given and was not taught to follow instructions.

## Use

{use}

## Sizes

{sizes}
## Training data

{data}
## Training

{training}
{check}
"""


def _table(rows: Mapping[str, object]) -> str:
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows.items())


def _sizes(config: KosmosConfig) -> dict[str, object]:
    vision = config.vision_config
    added = "" if config.positions == "none" else config.positions
    positions = [name for name in ("xPos" if config.xpos else "", added) if name]
    is_perceiver = config.resampler == "perceiver"
    kind = f"perceiver of {config.resampler_depth} layers" if is_perceiver else "one cross-attention"
    return {
        "decoder": f"{config.num_hidden_layers} layers x {config.hidden_size}, ffn {config.intermediate_size}",
        "attention": f"{config.num_attention_heads} heads, {config.num_key_value_heads} of keys and values"
        f"{', queries and keys normalized' if config.query_key_norm else ''}",
        "positions": " and ".join(positions) or "none",
        "vocabulary": f"{config.vocab_size}, {'tied' if config.tie_word_embeddings else 'untied'}"
        f"{', embeddings scaled' if config.scale_embeddings else ''}",
        "length": config.max_position_embeddings,
        "vision tower": f"CLIP, {vision.num_hidden_layers} layers x {vision.hidden_size}, patches of "
        f"{vision.patch_size} on {vision.image_size} x {vision.image_size} pixels, {config.vision_features} features",
        "resampler": f"{kind}, {config.num_image_tokens} embeddings a picture",
    }


def _parameters(facts: CardFacts) -> dict[str, object]:
    parts: dict[str, object] = {
        f"parameters, {part}": f"{number:,}" for part, number in facts.parameters_by_part.items()
    }
    return parts | {"parameters, in all": f"{sum(facts.parameters_by_part.values()):,}"}


def _data_mix(run: RunConfig) -> dict[str, object]:
    total = sum(corpus.weight for corpus in run.data.train)
    rows: dict[str, object] = {
        f"{corpus.prefix.name} ({corpus.kind})": f"{100 * corpus.weight / total:.1f}% of the tokens"
        for corpus in run.data.train
    }
    return rows


def _training(run: RunConfig, facts: CardFacts) -> dict[str, object]:
    training, optimizer = run.training, run.optimizer
    rows: dict[str, object] = {
        "step": f"{facts.step} of {training.steps}",
        "tokens a step": training.global_batch_size * run.data.sequence_length,
        "optimizer": f"AdamW, betas {optimizer.betas[0]} and {optimizer.betas[1]}, weight decay "
        f"{optimizer.weight_decay}, learning rate {optimizer.learning_rate} ({optimizer.decay}, "
        f"{optimizer.warmup_steps} steps of warm-up)",
        "precision": training.precision,
        "seed": training.seed,
    }
    losses = {name: value for name, value in facts.metrics.items() if name.startswith(("loss", "heldout"))}
    return rows | {
        name.replace("_", " "): f"{value:.4f}" for name, value in losses.items() if isinstance(value, int | float)
    }


def _check(facts: CardFacts) -> str:
    if facts.max_abs_logit_diff is None:
        return "The export was not compared with the training model."
    return f"Logits differ from the training model's by at most {facts.max_abs_logit_diff:.1e} (fp32)."
