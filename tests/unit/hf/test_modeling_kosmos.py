"""The exported model: its mathematics, its cache, padding, several images, gradients and errors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from megatron_kosmos.hf.configuration_kosmos import KosmosConfig
from megatron_kosmos.hf.decoder_kosmos import CACHE_NAME
from megatron_kosmos.hf.modeling_kosmos import KosmosForConditionalGeneration
from tests.unit.hf.reference import reference_logits
from tests.unit.hf.tiny import LATENTS, MAX_LENGTH, SIDE, VARIANTS, left_padded, prompt, tiny_config, tiny_model

variants = pytest.mark.parametrize("variant", VARIANTS)
NEW = 9


def generate(model: KosmosForConditionalGeneration, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    """Return the new tokens [B, N]."""
    ids = model.generate(**inputs, **({"max_new_tokens": NEW, "min_new_tokens": NEW} | options))
    return ids[:, inputs["input_ids"].shape[1] :]


@variants
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_the_papers_mathematics(variant: str, attention: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    model.set_attn_implementation(attention)
    for num_images in (0, 1, 2):
        row = prompt(num_images, num_text=11, seed=num_images)
        logits = model(**row).logits[0]
        assert torch.allclose(logits.double(), reference_logits(model, row), atol=2e-5, rtol=1e-5)


@variants
def test_the_cache_changes_no_token_and_no_logit(variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    batch = left_padded([prompt(n, num_text=4 + n, seed=n) for n in (2, 0, 1)])
    cached = generate(model, batch)
    assert torch.equal(cached, generate(model, batch, use_cache=False))
    assert torch.equal(cached, generate(model, batch, cache_implementation="static"))
    assert len(set(cached.flatten().tolist())) > 3  # not one token over and over
    row = prompt(1, num_text=12, seed=9)
    whole = model(**row, use_cache=False).logits
    head = {key: value if key == "pixel_values" else value[:, :10] for key, value in row.items()}
    first = model(**head)
    rest = model(row["input_ids"][:, 10:], attention_mask=row["attention_mask"], **{CACHE_NAME: first[CACHE_NAME]})
    assert torch.allclose(torch.cat((first.logits, rest.logits), dim=1), whole, atol=1e-5)


@torch.no_grad()
def test_the_cache_holds_to_the_last_token_of_the_longest_prompt() -> None:
    """At KOSMOS-1's length and head size, where xPos scales keys by up to 17: read in parts, token by token, padded."""
    length, padding = 2048, 60
    model = tiny_model(hidden_size=128, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=length)
    row = prompt(2, num_text=length - prompt(2, num_text=0, seed=1)["input_ids"].shape[1], seed=1)
    whole = model(**row, use_cache=False).logits
    head = {key: value if key == "pixel_values" else value[:, :1000] for key, value in row.items()}
    output = model(**head)
    parts = [output.logits]
    for start, end in zip((1000, *range(2000, length)), range(2000, length + 1), strict=True):
        seen = {"attention_mask": row["attention_mask"][:, :end], CACHE_NAME: output[CACHE_NAME]}
        output = model(row["input_ids"][:, start:end], **seen)
        parts.append(output.logits)
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=5e-5)
    short = {key: value if key == "pixel_values" else value[:, :-padding] for key, value in row.items()}
    padded = {
        key: value if key == "pixel_values" else torch.nn.functional.pad(value, (padding, 0))
        for key, value in short.items()
    }
    assert torch.allclose(model(**padded).logits[:, padding:], whole[:, :-padding], atol=5e-5)
    first = model(**{key: value if key == "pixel_values" else value[:, :-1] for key, value in row.items()})
    misplaced = {"position_ids": torch.tensor([[length - 2]]), CACHE_NAME: first[CACHE_NAME]}
    assert (model(row["input_ids"][:, -1:], **misplaced).logits - whole[:, -1:]).abs().max() > 0.1


@variants
def test_a_left_padded_batch_gives_what_each_prompt_gives_alone(variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    rows = [prompt(n, num_text=text, seed=10 + n) for n, text in ((0, 3), (1, 9), (2, 1), (0, 14))]
    batch = left_padded(rows)
    logits = model(**batch).logits
    assert torch.isfinite(logits).all()
    together = generate(model, batch)
    for index, row in enumerate(rows):
        length = row["input_ids"].shape[1]
        assert torch.allclose(logits[index, -length:], model(**row).logits[0], atol=1e-5)
        assert torch.equal(together[index], generate(model, row)[0])


@pytest.mark.parametrize("options", [{"num_beams": 5}, {"num_beams": 5, "num_return_sequences": 2}])
def test_beams_keep_each_rows_images_together(options: dict[str, int]) -> None:
    model = tiny_model()
    rows = [prompt(n, num_text=5, seed=20 + n) for n in (2, 0, 1)]
    together = generate(model, left_padded(rows), **options)
    assert torch.equal(together, generate(model, left_padded(rows), use_cache=False, **options))
    num = options.get("num_return_sequences", 1)
    for index, row in enumerate(rows):
        assert torch.equal(together[index * num : (index + 1) * num], generate(model, row, **options))


def log_likelihood(model: KosmosForConditionalGeneration, row: dict[str, torch.Tensor], new: torch.Tensor) -> float:
    """Return the log-probability of the tokens `new` [1, N] after one row, by one forward pass over all of it."""
    ids = torch.cat((row["input_ids"], new), dim=1)
    slots = torch.nn.functional.pad(row["image_embeds_position_mask"], (0, new.shape[1]))
    with torch.no_grad():
        logits = model(ids, pixel_values=row["pixel_values"], image_embeds_position_mask=slots).logits
    return float(logits.log_softmax(dim=-1)[:, -new.shape[1] - 1 : -1].gather(-1, new[..., None]).sum())


def test_beam_search_scores_are_log_likelihoods_and_beat_greedy() -> None:
    model = tiny_model()
    rows = [
        prompt(2, num_text=4, seed=seed) for seed in range(4)
    ]  # a beam with another image order would score otherwise
    options = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": NEW, "min_new_tokens": NEW}
    found = model.generate(**left_padded(rows), num_beams=5, **options)
    beams = [log_likelihood(model, row, new[None, -NEW:]) for row, new in zip(rows, found.sequences, strict=True)]
    assert torch.allclose(found.sequences_scores * NEW, torch.tensor(beams), atol=1e-4)
    assert sum(beams) > sum(log_likelihood(model, row, generate(model, row)) for row in rows)


def test_sampling_repeats_with_its_seed() -> None:
    model = tiny_model()
    row = prompt(2, num_text=4, seed=3)
    samples = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        samples.append(generate(model, row, do_sample=True, num_return_sequences=3))
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])
    assert len({tuple(sample.tolist()) for sample in samples[0]}) > 1


def test_images_are_encoded_once_and_matter() -> None:
    model = tiny_model()
    calls = []
    model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    row = prompt(2, num_text=4, seed=3)
    seen = generate(model, row, num_beams=3)
    assert len(calls) == 1
    swapped = row | {"pixel_values": row["pixel_values"].flip(0)}
    assert not torch.allclose(model(**row).logits, model(**swapped).logits, atol=1e-3)
    assert torch.equal(
        seen, generate(model, row | {"image_embeds": model.get_image_features(row["pixel_values"])}, num_beams=3)
    )


def test_positions_count_from_the_first_real_token() -> None:
    model = tiny_model(positions="learned")
    row = prompt(0, num_text=MAX_LENGTH - 2, seed=1)
    padded = left_padded([row, prompt(0, num_text=MAX_LENGTH + 20, seed=2)])
    inputs = {key: value[:1] for key, value in padded.items()}  # longer than the model, padding included
    assert torch.allclose(model(**inputs).logits[:, -MAX_LENGTH + 1 :], model(**row).logits, atol=1e-5)
    with pytest.raises(ValueError, match=f"max_position_embeddings={MAX_LENGTH}"):
        model(**padded)


def test_the_loss_is_the_cross_entropy_of_the_next_token_where_labels_count() -> None:
    model = tiny_model()
    row = prompt(1, num_text=8, seed=4)
    labels = row["input_ids"].masked_fill(row["image_embeds_position_mask"].bool(), -100)
    output = model(**row, labels=labels)
    log_probabilities = output.logits[0, :-1].log_softmax(dim=-1)
    counted = [i for i in range(labels.shape[1] - 1) if labels[0, i + 1] != -100]
    expected = -sum(log_probabilities[i, labels[0, i + 1]] for i in counted) / len(counted)
    assert torch.allclose(output.loss, torch.as_tensor(expected))


@variants
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_that_takes_part_gets_a_gradient(variant: str, checkpointing: bool) -> None:
    model = tiny_model(**VARIANTS[variant]).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    batch = left_padded([prompt(n, num_text=4, seed=n) for n in (2, 0, 1)])
    model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    is_normalized = model.config.vision_features == "normalized"
    unused = {"vision_tower.post_layernorm.weight", "vision_tower.post_layernorm.bias"}
    assert without == (set() if is_normalized else unused)
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in model.parameters() if p.grad is not None)


DROPOUTS: dict[str, dict[str, Any]] = {
    "decoder": {"dropout": 0.2, "attention_dropout": 0.2},
    "resampler": {"resampler": "cross_attention", "resampler_num_heads": 4, "resampler_attention_dropout": 0.2},
}


@pytest.mark.parametrize("where", DROPOUTS)
def test_dropout_acts_in_training_only(where: str) -> None:
    model = tiny_model(**DROPOUTS[where])
    row = prompt(1, num_text=8, seed=4)
    assert torch.equal(model(**row).logits, model(**row).logits)
    model.train()
    assert not torch.equal(model(**row).logits, model(**row).logits)


@variants
def test_saving_and_loading_is_bit_identical(variant: str, tmp_path: Path) -> None:
    model = tiny_model(**VARIANTS[variant])
    model.save_pretrained(tmp_path)
    loaded = KosmosForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    is_tied = model.config.tie_word_embeddings
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == is_tied
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    assert ("text_model.lm_head.weight" in stored) != is_tied


def test_bfloat16_weights_give_bfloat16_logits_near_the_fp32_ones() -> None:
    row = prompt(2, num_text=8, seed=4)
    expected = tiny_model()(**row).logits
    logits = tiny_model().to(torch.bfloat16)(**row).logits
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_hidden_states_and_attentions_can_be_had() -> None:
    model = tiny_model()
    model.set_attn_implementation("eager")
    row = prompt(1, num_text=8, seed=4)
    output = model(**row, output_hidden_states=True, output_attentions=True)
    length = row["input_ids"].shape[1]
    assert [tuple(states.shape) for states in output.hidden_states] == [(1, length, 32)] * 3
    assert [tuple(weights.shape) for weights in output.attentions] == [(1, 4, length, length)] * 2
    assert torch.allclose(output.attentions[0].sum(dim=-1), torch.ones(1, 4, length))


def test_slots_and_images_that_do_not_match_are_refused() -> None:
    model = tiny_model()
    row = prompt(2, num_text=4, seed=3)
    text = prompt(0, num_text=4, seed=3)
    one_image = row | {"pixel_values": row["pixel_values"][:1]}
    for call in (model, lambda **inputs: generate(model, inputs)):
        with pytest.raises(ValueError, match=rf"1 image\(s\) fill 1 x {LATENTS} slots, but .* marks \[{2 * LATENTS}\]"):
            call(**one_image)
        with pytest.raises(ValueError, match=r"0 image\(s\)"):
            call(**{key: value for key, value in row.items() if key != "pixel_values"})
        with pytest.raises(ValueError, match=r"1 image\(s\) .* marks \[0\]"):
            call(**text, pixel_values=row["pixel_values"][:1])
    batch = left_padded([row, prompt(1, num_text=4, seed=4)])
    batch["image_embeds_position_mask"][0, -1] = 1  # one slot too many here, one too few there
    batch["image_embeds_position_mask"][1, batch["image_embeds_position_mask"][1].nonzero()[0]] = 0
    with pytest.raises(ValueError, match=f"needs {LATENTS} slots in one row"):
        model(**batch)
    with pytest.raises(ValueError, match="without image_embeds_position_mask"):
        model(text["input_ids"], pixel_values=torch.zeros(1, 3, SIDE, SIDE))
    with pytest.raises(ValueError, match="has shape"):
        model(text["input_ids"], image_embeds_position_mask=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        generate(model, row, prefill_chunk_size=4)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_attention_heads": 5}, "hidden_size=32 is not a multiple of num_attention_heads=5"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"hidden_size": 12}, "xpos rotates pairs"),
        ({"resampler": "cross_attention", "resampler_num_heads": 5}, "hidden_size=32 is not .* resampler_num_heads=5"),
        ({"positions": "rotary"}, "positions='rotary' is none of none, learned, sinusoidal"),
        ({"resampler": "linear"}, "resampler='linear' is none of perceiver, cross_attention"),
        ({"vision_features": "pooled"}, "vision_features='pooled' is none of hidden, normalized"),
    ],
)
def test_sizes_that_do_not_divide_and_unknown_switches_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_the_default_configuration_is_the_papers() -> None:
    config = KosmosConfig()
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (24, 2048, 8192)
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (32, 32, 64007)
