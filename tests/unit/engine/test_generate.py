"""Generation from an exported folder: batches, search, sampling, streaming and what is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_kosmos.engine.generate import (
    Decoding,
    GenerationError,
    Generator,
    Request,
    Sampling,
    batches_of_like_length,
    read_picture,
)
from tests.unit.engine.exported import exported_folder, picture

PROMPTS = ["An image of", "Words and <image> numbers <image>, so", "no picture", "seven", "a <image> b"]
IMAGES = [[picture(0)], [picture(1), picture(2)], [], [picture(3)], [picture(4)]]
GREEDY = Decoding(max_new_tokens=8)
DRAWN = Decoding(max_new_tokens=12, sampling=Sampling(temperature=1.5, top_p=0.95, top_k=50, seed=4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_folder(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def generator(folder: Path) -> Generator:
    return Generator.load(folder, torch.device("cpu"))


@pytest.mark.parametrize(
    "decoding", [GREEDY, Decoding(8, num_beams=5), Decoding(8, num_beams=3, length_penalty=-2.0), DRAWN]
)
def test_a_batch_gives_what_each_prompt_gives_alone(generator: Generator, decoding: Decoding) -> None:
    together = generator.generate(PROMPTS, IMAGES, decoding)
    assert len(set(together)) > 1
    for size in (1, 3):
        assert Generator(generator.model, generator.processor, size).generate(PROMPTS, IMAGES, decoding) == together
    requests = {number: Request(PROMPTS[number], IMAGES[number]) for number in (3, 1)}
    assert dict(generator.answers(requests, decoding)) == {number: together[number] for number in (3, 1)}


def test_a_batch_needs_no_picture_at_all_and_no_prompt(generator: Generator) -> None:
    texts = generator.generate(["Words", "and a longer line of numbers"], decoding=GREEDY)
    assert texts == [
        generator.generate([prompt], [[]], GREEDY)[0] for prompt in ("Words", "and a longer line of numbers")
    ]
    assert generator.generate([], [], GREEDY) == []


def test_longer_answers_are_preferred_as_the_penalty_says(generator: Generator) -> None:
    lengths = [
        sum(map(len, generator.generate(PROMPTS, IMAGES, Decoding(16, num_beams=5, length_penalty=penalty))))
        for penalty in (-8.0, 8.0)
    ]
    assert lengths[0] < lengths[1]


def test_samples_repeat_with_their_seed_and_differ_among_prompts(generator: Generator) -> None:
    def sample(seed: int, prompts: list[str]) -> list[str]:
        decoding = Decoding(12, sampling=Sampling(temperature=2.0, top_p=0.95, seed=seed))
        return generator.generate(prompts, [[picture(0)]] * len(prompts), decoding)

    three = sample(4, ["An image of"] * 3)
    assert three == sample(4, ["An image of"] * 3)
    assert len({*three, *sample(50, ["An image of"])}) == 4
    assert sample(4 + 2, ["An image of"]) == [three[2]]  # the prompt of number 2, alone


def test_draws_have_the_probabilities_of_the_softmax_that_is_left() -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    rows = 20_000
    cases = ((Sampling(), 6), (Sampling(temperature=0.5), 6), (Sampling(top_k=2), 2), (Sampling(top_p=0.8), 3))
    for sampling, kept in cases:
        scores = logits.repeat(rows, 1)
        processors = sampling.processors(range(rows))
        drawn = processors(torch.zeros(rows, 1, dtype=torch.long), scores).argmax(dim=1)
        frequencies = torch.bincount(drawn, minlength=6) / rows
        expected = (logits[:kept] / sampling.temperature).softmax(0)
        # Five standard deviations of a share of 20,000 draws.
        assert (frequencies[:kept] - expected).abs().max() < 5 * (0.25 / rows) ** 0.5
        assert not frequencies[kept:].any()


def test_temperature_near_zero_and_one_token_to_draw_from_are_greedy(generator: Generator) -> None:
    greedy = generator.generate(PROMPTS, IMAGES, GREEDY)
    for sampling in (Sampling(temperature=1e-4), Sampling(top_k=1), Sampling(top_p=1e-6)):
        assert generator.generate(PROMPTS, IMAGES, Decoding(8, sampling=sampling)) == greedy


@pytest.mark.parametrize("decoding", [Decoding(24), DRAWN])
def test_a_stream_is_the_text_in_pieces(generator: Generator, decoding: Decoding) -> None:
    for prompt, images in zip(PROMPTS, IMAGES, strict=True):
        pieces: list[str] = []
        text = generator.stream(Request(prompt, images), pieces.append, decoding)
        assert "".join(pieces) == text == generator.generate([prompt], [images], decoding)[0]
        assert len(pieces) > 2


def test_markers_are_never_written(generator: Generator) -> None:
    inputs = generator.processor(text="An image of", images=picture(0), return_tensors="pt")
    tokens = generator.model.generate(**inputs, do_sample=True, temperature=10.0, num_return_sequences=20)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    tokenizer = generator.processor.tokenizer
    assert not (new == tokenizer.image_token_id).any()
    assert not (new == tokenizer.bos_token_id).any()
    assert new.shape[1] <= 64


def test_batches_hold_prompts_of_like_length_and_the_first_comes_first() -> None:
    lengths = {7: 50, 3: 9, 8: 48, 1: 10, 5: 11}
    assert batches_of_like_length(lengths, 2) == [[7], [3, 1], [5, 8]]
    assert batches_of_like_length({}, 4) == []


def test_a_bad_request_spoils_no_other(generator: Generator, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    requests = {
        0: Request("one <image>", []),
        1: Request("An image of", [picture(0)]),
        2: Request("An image of", [tmp_path / "text.png"]),
        3: Request("An image of", [tmp_path / "none.png"]),
        4: Request("word " * 500),
    }
    answers = dict(generator.answers(requests, GREEDY))
    assert answers[1] == generator.generate(["An image of"], [[picture(0)]], GREEDY)[0]
    for number, message in {
        0: "1 <image> for 0 image(s) in 'one <image>'",
        2: "text.png: no picture in these",
        3: "none.png: there is no such file",
        4: "and 8 new ones are more than the 300 of the model; shorten the prompt, give fewer pictures",
    }.items():
        assert isinstance(answers[number], GenerationError)
        assert message in str(answers[number])
    with pytest.raises(GenerationError, match="prompt 1: 1 <image> for 0"):
        generator.generate(["a", "one <image>"], [[], []], GREEDY)


def test_a_prompt_may_fill_the_model_to_the_last_token(generator: Generator) -> None:
    words = "seven " * 40
    room = 300 - generator.processor.num_tokens(words, 1)
    assert generator.generate([words], [[picture(0)]], Decoding(room))
    with pytest.raises(GenerationError, match=rf"1 x 3 of pictures among them, and {room + 1} new ones"):
        generator.generate([words], [[picture(0)]], Decoding(room + 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 is below 1"),
        ({"num_beams": 0}, "num_beams=0 is below 1"),
        ({"length_penalty": 2.0}, "length_penalty=2.0 weighs beams"),
        ({"num_beams": 2, "sampling": Sampling()}, "searches and does not draw"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        Decoding(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 0.0), ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.5), ("top_k", -1), ("seed", -1)],
)
def test_draws_that_mean_nothing_are_refused(name: str, value: float) -> None:
    with pytest.raises(GenerationError, match=f"{name}={value}"):
        Sampling(**{name: value})  # type: ignore[arg-type]


def test_calls_that_cannot_work_are_refused(generator: Generator, tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match="2 prompts need as many lists of images, not 1"):
        generator.generate(["a", "b"], [[]], GREEDY)
    with pytest.raises(GenerationError, match="max_batch_size=0"):
        Generator(generator.model, generator.processor, max_batch_size=0)
    with pytest.raises(GenerationError, match="num_beams=2 knows its text at the end only"):
        generator.stream(Request("a"), print, Decoding(num_beams=2))
    with pytest.raises(GenerationError, match="there is no such file"):
        read_picture(tmp_path)


Damage = Callable[[Path], object]


def without(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def filled_with(name: str, text: str) -> Damage:
    return lambda folder: (folder / name).write_text(text)


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["text_model.model.layers.0.ffn.fc1.weight"]
    weights["text_model.model.layers.1.ffn.fc1.bias"] = torch.zeros(3)
    weights["another"] = torch.zeros(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "there is no folder"),
        (without("config.json"), "is no exported model; make one with `kosmos convert to-hf"),
        (filled_with("config.json", "{"), "is not a configuration of transformers"),
        (filled_with("config.json", '{"model_type": "gpt2"}'), "says model_type='gpt2'"),
        (filled_with("config.json", '{"model_type": "kosmos-2"}'), "is transformers' own kosmos-2"),
        (filled_with("config.json", '{"model_type": "megatron_kosmos", "hidden_size": 7}'), "is not a multiple of"),
        (without("model.safetensors"), "has neither model.safetensors nor"),
        (filled_with("model.safetensors", "no weights"), "model.safetensors cannot be read"),
        (without_a_weight, r"fc1.weight is missing; .*1.ffn.fc1.bias is \[3\], not \[\d+\]; another is left over"),
        (without("generation_config.json"), "does not load: .*generation_config.json"),
        (without("processor_config.json"), "the processor of .* does not load"),
        (without("kosmos_tokenizer.json"), "the processor of .* does not load"),
        (filled_with("kosmos_tokenizer.json", "{"), "the processor of .* does not load"),
        (filled_with("tokenizer.model", "no model"), "the processor of .* does not load"),
    ],
)  # fmt: skip
def test_what_is_no_whole_export_is_refused(folder: Path, tmp_path: Path, damage: Damage, message: str) -> None:
    shutil.copytree(folder, tmp_path / "export")
    damage(tmp_path / "export")
    with pytest.raises(GenerationError, match=message):
        Generator.load(tmp_path / "export")
