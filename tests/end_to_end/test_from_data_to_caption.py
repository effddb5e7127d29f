"""The way of a user, by the public commands: data, training on two processes, resume, export, evaluation, caption."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks import generation
from megatron_kosmos.engine.generate import Generator

ROOT = Path(__file__).parents[2]
KINDS = ("text", "captions", "interleaved")
SMALL = [
    "training.steps=4",
    "optimizer.warmup_steps=1",
    "checkpoint.every=2",
    "evaluation.every=2",
    "evaluation.sequences=4",
    "evaluation.captions=2",
    "evaluation.caption_tokens=2",
]


def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def kosmos(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "megatron_kosmos", *arguments, check=check)


def train(*settings: str, processes: int = 2, check: bool = True) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    config = ["-m", "megatron_kosmos", "train", "--config", "configs/kosmos_tiny.yaml"]
    return run(*launcher, *config, *SMALL, *settings, check=check)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return every step's numbers but those that differ from run to run: times, shares of them, memory."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    of_the_machine = re.compile(r".*second.*|mfu|rank_slowest|share_.*|memory_.*")
    return [
        {key: value for key, value in json.loads(line).items() if not of_the_machine.fullmatch(key)} for line in lines
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's corpora, prepared by the tools."""
    folder = tmp_path_factory.mktemp("data")
    raw = folder / "raw"
    run(sys.executable, "tools/quickstart_data.py", "--output", str(raw), "--seed", "1")
    corpora = yaml.safe_load((raw / "corpora.yaml").read_text())
    tokenizer = folder / "tokenizer"
    kosmos(
        *("tokenizer", "train", "--input", str(raw / "tokenizer.txt"), "--output", str(tokenizer)),
        *("--vocab-size", str(corpora["tokenizer"]["vocab_size"])),
    )
    for corpus in corpora["corpora"]:
        run(
            *(sys.executable, "tools/preprocess_data.py", corpus["command"], "--tokenizer", str(tokenizer)),
            *("--input", *(str(raw / name) for name in corpus["inputs"]), "--output", str(folder / corpus["name"])),
            *("--sequence-length", "128", "--num-latents", "8"),
        )
    return folder


@pytest.fixture(scope="module")
def settings(data: Path) -> list[str]:
    """Overrides that point the tiny preset to the data."""
    prefixes = [
        f"data.{split}.{index}.prefix={data}/{kind}_{split}"
        for split in ("train", "heldout")
        for index, kind in enumerate(KINDS)
    ]
    return [f"data.tokenizer={data}/tokenizer", *prefixes]


@pytest.fixture(scope="module")
def trained(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps on two pipeline stages."""
    run_dir = tmp_path_factory.mktemp("run")
    train(f"run_dir={run_dir}", "parallel.pipeline_parallel_size=2", *settings)
    return run_dir


def test_a_run_leaves_what_design_promises(trained: Path) -> None:
    lines = metrics(trained)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"loss", "loss_text", "loss_caption", "loss_interleaved", "grad_norm", "lr", "tokens"} <= lines[0].keys()
    assert lines[-1]["tokens"] == 4 * 16 * 128
    assert all(0.5 < line["packing_efficiency"] <= 1 and line["documents_cut"] > 0 for line in lines)
    assert "packing concatenate: " in (trained / "logs" / "rank_00000.log").read_text()
    assert {"heldout_loss_text", "heldout_loss_caption", "heldout_caption_exact_match"} <= lines[-1].keys()
    assert lines[-1]["loss"] < lines[0]["loss"]
    names = sorted(path.name for path in (trained / "checkpoints").iterdir())
    assert names == ["latest", "step_00000002", "step_00000004"]
    assert (trained / "config.yaml").is_file()
    assert [path.name for path in sorted((trained / "logs").iterdir())] == ["rank_00000.log", "rank_00001.log"]
    board = EventAccumulator(str(trained / "tensorboard")).Reload().Tags()
    assert {"loss/text", "loss/caption", "loss/interleaved", "optimizer/lr", "optimizer/grad_norm"} <= {
        *board["scalars"]
    }
    assert {"heldout/0", "heldout/1"} == {*board["images"]}


def test_a_run_that_lost_its_end_goes_on_with_the_same_numbers(
    trained: Path, settings: list[str], tmp_path: Path
) -> None:
    """The metrics stand at step 4, the checkpoint at step 2, as after a crash."""
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    train(f"run_dir={tmp_path / 'run'}", "parallel.pipeline_parallel_size=2", *settings)
    assert metrics(tmp_path / "run") == metrics(trained)


def test_a_run_can_keep_the_documents_of_a_row_apart(trained: Path, settings: list[str], tmp_path: Path) -> None:
    train(f"run_dir={tmp_path}", "data.document_mask=true", "training.steps=1", *settings, processes=1)
    (line,) = metrics(tmp_path)
    assert line["loss"] != metrics(trained)[0]["loss"]
    assert {"heldout_loss_text", "heldout_loss_caption", "heldout_caption_exact_match"} <= line.keys()
    assert "kernels: attention sdpa, layer norm torch" in (tmp_path / "logs" / "rank_00000.log").read_text()


def test_a_finished_run_does_not_start_again(trained: Path, settings: list[str]) -> None:
    before = metrics(trained)
    train(f"run_dir={trained}", "parallel.pipeline_parallel_size=2", *settings)
    assert metrics(trained) == before


@pytest.mark.parametrize("layout", [("parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true"), ()])
def test_other_layouts_give_the_same_losses(
    layout: tuple[str, ...], trained: Path, settings: list[str], tmp_path: Path
) -> None:
    """TP2+SP and DP2 on the real data, vision tower, evaluation and captions included; and they can be profiled."""
    train(f"run_dir={tmp_path}", "logging.profile_steps=[2,3]", *layout, *settings)
    traces = sorted(path.name.partition(".")[0] for path in (tmp_path / "tensorboard").glob("*.pt.trace.json"))
    assert traces == ["rank_0", "rank_1"]
    for line, expected in zip(metrics(tmp_path), metrics(trained), strict=True):
        for key in expected:
            # The clipped AdamW steps let rounding grow by a digit in four steps.
            assert line[key] == pytest.approx(expected[key], rel=1e-5), f"{key} at step {expected['step']}"


def test_export_evaluates_and_captions(trained: Path, data: Path, tmp_path: Path) -> None:
    export = tmp_path / "hf"
    kosmos("convert", "to-hf", str(trained), str(export))
    assert json.loads((export / "conversion.json").read_text())["max_abs_logit_diff"] <= 1e-4
    evaluation_file = tmp_path / "evaluation.json"
    config = str(trained / "config.yaml")
    limits = ["--max-pictures", "3", "--max-sequences", "4"]
    kosmos("evaluate", "--model", str(export), "--config", config, "--output", str(evaluation_file), *limits)
    evaluation = json.loads(evaluation_file.read_text())
    # The same sequences as the run's own last evaluation, through the other implementation.
    for kind, loss in evaluation["loss"].items():
        assert loss == pytest.approx(metrics(trained)[-1][f"heldout_loss_{kind}"], rel=1e-4)
    assert 4.0 < evaluation["unigram_text_loss"] < 6.9
    assert evaluation["pictures"] == 3
    picture = sorted((data / "raw" / "images").glob("*.png"))[0]
    answer = kosmos(
        *("generate", "--model", str(export), "--image", str(picture), "--prompt", "", "--max-new-tokens", "4")
    )
    assert answer.stdout.strip()


def test_a_trained_export_gives_the_same_tokens_however_it_is_asked(
    data: Path, settings: list[str], tmp_path: Path
) -> None:
    """50 prompts with 0 to 4 pictures: with a cache and without, one by one and in batches, searched and drawn.

    The model is small and has learned for 60 steps; the quickstart's is compared by `benchmarks/generation.py`.
    """
    small = ["model.decoder.num_layers=2", "model.decoder.width=64", "model.decoder.ffn_width=256"]
    one_end = ["training.steps=60", "checkpoint.every=0", "evaluation.every=1000", "evaluation.captions=0"]
    train(f"run_dir={tmp_path}/run", *settings, *small, *one_end, processes=1)
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert losses[-1] < losses[0] - 2
    kosmos("convert", "to-hf", f"{tmp_path}/run", f"{tmp_path}/hf")
    generator = Generator.load(tmp_path / "hf", torch.device("cpu"))
    prompts = generation.make_prompts(data / "raw" / "images", 50)
    rows = generation.compare(generator, prompts, max_new_tokens=6, batch_size=16)
    assert [row["same_answers"] for row in rows] == [50] * 12
    assert all(row["different_answers"] > 10 for row in rows)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["model.decoder.vocab_size=500"], "model.decoder.vocab_size=500 is smaller than the vocabulary of"),
        (["model.decoder.colour=blue"], "model.decoder.colour"),
        (["training.steps=many"], "training.steps"),
        (["parallel.tensor_parallel_size=3"], "model.decoder.num_heads=4 is not a multiple of"),
        (["parallel.pipeline_parallel_size=4"], "start a multiple of 4"),
        (["parallel.pipeline_parallel_size=2", "parallel.zero_stage=3"], "use zero_stage 0 or 1"),
        (["parallel.context_parallel_size=2"], "context_parallel_size=2 is not supported"),
        (["training.global_batch_size=10"], "training.global_batch_size=10 is not a multiple of"),
        (["data.tokenizer=/nowhere"], "/nowhere"),
        (["data.train.0.prefix=/nowhere/text"], "/nowhere/text"),
        (["run_dir=/dev/null/run"], "cannot write to run_dir=/dev/null/run"),
    ],
    ids=lambda value: value[0].partition("=")[0] if isinstance(value, list) else "",
)
def test_a_wrong_setting_is_told_before_anything_starts(
    wrong: list[str], message: str, settings: list[str], tmp_path: Path
) -> None:
    result = kosmos(
        *("train", "--config", "configs/kosmos_tiny.yaml", *SMALL, f"run_dir={tmp_path}", *settings, *wrong),
        check=False,
    )
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert not (tmp_path / "checkpoints").exists()


def test_one_process_needs_no_launcher(settings: list[str], tmp_path: Path) -> None:
    kosmos(
        *("train", "--config", "configs/kosmos_tiny.yaml", *SMALL, f"run_dir={tmp_path}", *settings),
        *("training.steps=1", "evaluation.captions=0"),
    )
    assert [line["step"] for line in metrics(tmp_path)] == [1]


def test_changed_data_is_refused_on_resume(trained: Path, settings: list[str], tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    changed = ["parallel.pipeline_parallel_size=2", "training.steps=6", "data.train.0.weight=1"]
    result = train(f"run_dir={tmp_path / 'run'}", *settings, *changed, check=False)
    assert result.returncode != 0
    assert "was trained on other data" in result.stderr
    assert metrics(tmp_path / "run") == metrics(trained)
    assert os.listdir(tmp_path / "run" / "checkpoints") == os.listdir(trained / "checkpoints")


@pytest.mark.nightly
def test_a_bad_picture_ends_all_ranks_with_one_message(data: Path, settings: list[str], tmp_path: Path) -> None:
    """Under the launcher, which ends the others as soon as one rank is gone: the message comes before that."""
    for path in data.glob("captions_train*"):
        shutil.copy(path, tmp_path)
    shard = tmp_path / "captions_train-images-00000.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    layout = ["parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"]
    where = [*settings, f"data.train.1.prefix={tmp_path}/captions_train", f"run_dir={tmp_path}/run"]
    result = train(*layout, *where, processes=4, check=False)
    assert result.returncode != 0
    messages = [line for line in result.stderr.splitlines() if line.startswith("kosmos train: ")]
    assert len(messages) == 1
    assert re.match(r"kosmos train: rank [01]: \S*captions_train-images-00000\.tar at byte \d+", messages[0])
