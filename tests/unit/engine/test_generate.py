"""Generation from an exported folder: batches, search, sampling, the command."""

from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from megatron_kosmos.cli import generate as generate_command
from megatron_kosmos.data.tokenization.making import TrainingSettings, train_tokenizer
from megatron_kosmos.engine.convert import ExportOptions, to_hf
from megatron_kosmos.engine.generate import GenerationError, Generator, Sampling, read_picture
from tests.unit.hf.checkpoints import trained_run

PROMPTS = ["An image of", "Words and <image> numbers <image>, so", "no picture", "seven"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("export")
    text = ["An image of a handwritten seven. Words and numbers, 0 1 2 3 4 5 6 7 8 9.\nAnother line."] * 5
    train_tokenizer(text, TrainingSettings(vocab_size=300)).save(root / "tokenizer")
    trained_run(root / "run", root / "tokenizer", model__decoder__vocab_size=300)
    to_hf(root / "run", root / "hf", ExportOptions(verify=False))
    return root / "hf"


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8))


IMAGES = [[picture(0)], [picture(1), picture(2)], [], [picture(3)]]


@pytest.mark.parametrize("num_beams", [1, 5])
def test_a_batch_gives_what_each_prompt_gives_alone(folder: Path, num_beams: int) -> None:
    generator = Generator.load(folder)
    together = generator.generate(PROMPTS, IMAGES, max_new_tokens=8, num_beams=num_beams)
    alone = [
        text
        for prompt, images in zip(PROMPTS, IMAGES, strict=True)
        for text in generator.generate([prompt], [images], max_new_tokens=8, num_beams=num_beams)
    ]
    assert together == alone
    assert len(set(together)) > 1
    small = Generator(generator.model, generator.processor, max_batch_size=3)
    assert small.generate(PROMPTS, IMAGES, max_new_tokens=8, num_beams=num_beams) == together
    assert generator.generate([], [], max_new_tokens=8) == []


def test_samples_repeat_with_their_seed(folder: Path) -> None:
    generator = Generator.load(folder)
    first, again, other = (
        generator.generate(PROMPTS[:1], IMAGES[:1], 12, sampling=Sampling(temperature=2.0, top_p=0.95, seed=seed))
        for seed in (4, 4, 5)
    )
    assert first == again != other


def test_markers_are_never_written(folder: Path) -> None:
    generator = Generator.load(folder)
    inputs = generator.processor(text="An image of", images=picture(0), return_tensors="pt")
    tokens = generator.model.generate(**inputs, do_sample=True, temperature=10.0, num_return_sequences=20)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    tokenizer = generator.processor.tokenizer
    assert not (new == tokenizer.image_token_id).any()
    assert not (new == tokenizer.bos_token_id).any()
    assert new.shape[1] <= 64


def test_errors_say_what_to_do(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match="is no exported model; make one with `kosmos convert to-hf"):
        Generator.load(tmp_path)
    with pytest.raises(GenerationError, match="2 prompts need as many lists of images, not 1"):
        Generator.load(folder).generate(["a", "b"], [[]], max_new_tokens=3)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(GenerationError, match=r"text.png: no picture in these"):
        read_picture(tmp_path / "text.png")
    with pytest.raises(GenerationError, match=r"none.png: "):
        read_picture(tmp_path / "none.png")


def test_the_command_prints_the_text(folder: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    generate_command.register(app)
    app.callback()(lambda: None)  # as in the application: a group, not a single command
    picture(0).save(tmp_path / "a.png")
    picture(1).save(tmp_path / "b.png")
    options = [
        "generate",
        "--model",
        str(folder),
        "--image",
        str(tmp_path / "a.png"),
        "--image",
        str(tmp_path / "b.png"),
    ]
    result = CliRunner().invoke(app, [*options, "--max-new-tokens", "7", "--num-beams", "5"])
    assert result.exit_code == 0, result.output
    expected = Generator.load(folder).generate(["An image of"], [[picture(0), picture(1)]], 7, num_beams=5)
    assert result.stdout.splitlines() == expected[0].splitlines()
    sampled = CliRunner().invoke(app, [*options, "--sample", "--seed", "3", "--max-new-tokens", "7"])
    assert sampled.exit_code == 0
    assert sampled.stdout != result.stdout
    failed = CliRunner().invoke(app, [*options, "--prompt", "one <image>"])
    assert failed.exit_code == 1
