"""A loss that jumps at poisoned data rolls the run back and passes over them; a run that only gets NaN is ended."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_kosmos.config import RunConfig, load_config
from megatron_kosmos.data.loading.collate import ImageFormat
from megatron_kosmos.data.loading.loader import BatchGeometry, StepLoader
from megatron_kosmos.data.packing.row_format import RowFormat
from megatron_kosmos.data.preparation.preprocess import Preparation, prepare
from megatron_kosmos.data.tokenization.making import TrainingSettings, train_tokenizer
from megatron_kosmos.engine.ending import ending_path, read_ending
from megatron_kosmos.engine.rollbacks import read_rollbacks
from tests.end_to_end.lives import CONFIG, RANKS, TINY, Life, series

pytestmark = pytest.mark.distributed

STEPS, POISON = 22, 40
"""Steps of a run, and the number of the poisoned document."""
SPIKES = [
    *("health.spike_deviations=2", "health.spike_window=8"),
    *("health.on_spike=roll_back", "health.spike_skip_steps=2"),
]
LAYOUTS = {
    "dp2_zero1": [],
    "dp2_zero3": ["parallel.zero_stage=3"],
    "tp2": ["parallel.tensor_parallel_size=2"],
    "pp2": ["parallel.pipeline_parallel_size=2"],
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a run on a corpus of one sentence, in which one document is noise, which comes late."""
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(1)
    documents = ["seven brown foxes jump over the lazy dogs again and " * 12 for _ in range(80)]
    documents[POISON] = "".join(draw.choice("bcdfghjkmpqtvwxz;:?!%&") for _ in range(150))
    train_tokenizer([*documents, *map(str, range(2000))], TrainingSettings(400)).save(folder / "tokenizer")
    source = folder / "pages.jsonl"
    source.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    row_format = RowFormat(sequence_length=64, num_latents=4)
    prepare(Preparation("text", (source,), folder / "pages", folder / "tokenizer", row_format=row_format))
    corpus = f"data.train=[{{kind: text, prefix: {folder / 'pages'}}}]"
    settings = [*TINY, f"data.tokenizer={folder / 'tokenizer'}", corpus, f"training.steps={STEPS}"]
    settings += ["checkpoint.every=5", "data.num_workers=0", "optimizer.learning_rate=0.01", "model.decoder.dropout=0"]
    settings.append("training.seed=134")
    assert poisoned_steps(load_config(CONFIG, settings)) == [14, 15]
    return settings


def poisoned_steps(run: RunConfig) -> list[int]:
    """Return the steps, counted from 1, whose samples have a part of the poisoned document."""
    geometry = BatchGeometry(1, run.training.global_batch_size)
    loader = StepLoader(run.data, ImageFormat(4, 32), geometry, run.training.seed)
    return [step + 1 for step in range(STEPS) if any(POISON in origin["documents"] for origin in loader.origins(step))]


def events(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "health.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.nightly if name != "dp2_zero1" else ()) for name in LAYOUTS]
)
def test_a_spike_rolls_back_and_passes_over_its_data(layout: str, settings: list[str], tmp_path: Path) -> None:
    """After it the run is, bit for bit, the one that was told to pass over these data from the start."""
    settings = [*settings, *SPIKES, *LAYOUTS[layout]]
    run_dir = tmp_path / "run"
    life = Life(run_dir, settings)
    assert life.finish() == [75] * RANKS, life.said(0) + life.said(1)
    assert read_ending(run_dir) == "interrupted"
    life = Life(run_dir, settings)
    assert life.finish() == [0] * RANKS, life.said(0) + life.said(1)

    (rollback,), (event,) = read_rollbacks(run_dir), events(run_dir)
    assert (rollback.step, rollback.to_step, rollback.skip_steps) == (15, 10, (14, 15))
    assert (event["event"], event["step"], event["data_step"]) == ("spike", 15, 15)
    assert any(POISON in sample["documents"] for sample in event["samples"])

    told = tmp_path / "told"
    life = Life(told, [*settings, "data.skip_steps=[[14,15]]"])
    assert life.finish() == [0] * RANKS, life.said(0) + life.said(1)
    assert not (told / "rollbacks.json").exists()
    assert len(series(told)) == STEPS
    assert series(run_dir) == series(told)


@pytest.mark.nightly
def test_after_the_last_rollback_a_spike_ends_the_run(settings: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    life = Life(run_dir, [*settings, *SPIKES, "health.max_rollbacks=0"])
    assert life.finish() == [1] * RANKS
    assert "is a spike" in life.said(0)
    assert "health.max_rollbacks=0" in life.said(0)
    assert (read_ending(run_dir), read_rollbacks(run_dir)) == ("refused", ())
    assert series(run_dir)[-1][1] == events(run_dir)[-1]["loss"]


def test_nothing_but_nan_ends_the_run(settings: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    broken = ["optimizer.learning_rate=1e30", "optimizer.warmup_steps=0", "health.max_bad_steps_in_a_row=3"]
    life = Life(run_dir, [*settings, *broken, "training.precision=fp32"])
    assert life.finish() == [1] * RANKS, life.said(0)
    assert read_ending(run_dir) == "refused"
    assert "3 steps in a row, up to step 4, were not finite" in ending_path(run_dir).read_text()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["steps_skipped"] for line in lines] == [0, 1, 2, 3]
    assert [line["grad_norm"] is None for line in lines] == [False, True, True, True]
    assert [(event["event"], event["step"]) for event in events(run_dir)] == [("skipped", step) for step in (2, 3, 4)]
