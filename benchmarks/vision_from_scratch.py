"""What lets a vision side that starts from scratch be read? Trains the tiny KOSMOS with and without the two remedies of
decision 10 and writes docs/vision_from_scratch.md.

    .venv/bin/python benchmarks/vision_from_scratch.py --data runs/quickstart --output runs/vision_from_scratch

Takes the prepared data of a quickstart run. A run that is there already is not trained again. Also writes
benchmarks/results/vision_from_scratch.json.
"""

import json
import os
import platform
import subprocess
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import typer

ROOT = Path(__file__).parents[1]
STEPS, EVERY = 600, 100
VARIANTS = {
    "neither": ("0.02", "1.0"),
    "position embeddings at std 0.3": ("0.3", "1.0"),
    "queries and keys doubled": ("0.02", "2.0"),
    "both": ("0.3", "2.0"),
}
"""Values of model.vision.position_embedding_std and model.resampler.query_key_gain."""


def main(
    data: Annotated[Path, typer.Option(help="Folder of a quickstart run.")] = Path("runs/quickstart"),
    output: Annotated[Path, typer.Option(help="Folder that gets a run for each variant and seed.")] = Path(
        "runs/vision_from_scratch"
    ),
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Seeds to run.")] = None,
) -> None:
    """Train what is missing, then write the page."""
    curves = {
        name: [curve(values, seed, data, output / f"{values[0]}_{values[1]}_seed{seed}") for seed in seeds or (1, 2)]
        for name, values in VARIANTS.items()
    }
    record = {"machine": machine(), "date": date.today().isoformat(), "seeds": seeds or [1, 2], "variants": curves}
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    (results / "vision_from_scratch.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (ROOT / "docs" / "vision_from_scratch.md").write_text(page(record), encoding="utf-8")


def curve(values: tuple[str, str], seed: int, data: Path, folder: Path) -> list[dict[str, float]]:
    """Return the held-out loss of captions and their exact matches every `EVERY` steps, training if need be."""
    metrics = folder / "metrics.jsonl"
    if not (folder / "checkpoints").exists():
        corpora = [
            f"data.{split}.{index}.prefix={data}/data/{kind}_{split}"
            for split in ("train", "heldout")
            for index, kind in enumerate(("text", "captions", "interleaved"))
        ]
        settings = [
            f"run_dir={folder}",
            f"data.tokenizer={data}/data/tokenizer",
            f"training.seed={seed}",
            f"training.steps={STEPS}",
            f"evaluation.every={EVERY}",
            "evaluation.captions=100",
            "evaluation.sequences=4",
            "checkpoint.every=0",
            f"model.vision.position_embedding_std={values[0]}",
            f"model.resampler.query_key_gain={values[1]}",
        ]
        config = str(ROOT / "configs" / "kosmos_tiny.yaml")
        command = [str(ROOT / ".venv" / "bin" / "kosmos"), "train", "--config", config, *settings, *corpora]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    lines = (json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines())
    fields = ("step", "heldout_loss_caption", "heldout_caption_exact_match")
    return [{field: line[field] for field in fields} for line in lines if fields[2] in line]


def machine() -> str:
    """Describe what the figures were measured on."""
    return (
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"
    )


def page(record: dict[str, Any]) -> str:
    """Return the page of the results in Markdown."""
    steps = range(EVERY, STEPS + 1, EVERY)
    lines = [["what differs from the defaults", *map(str, steps)], ["---"] * (len(steps) + 1)]
    for name, curves in record["variants"].items():
        points = zip(*curves, strict=True)
        cells = [", ".join(f"{point['heldout_caption_exact_match']:.2f}" for point in group) for group in points]
        lines.append([name, *cells])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    losses = "; ".join(
        f"{name} {mean(points[-1]['heldout_loss_caption'] for points in curves):.3f}"
        for name, curves in record["variants"].items()
    )
    return f"""# A vision side that starts from scratch, measured

The tiny KOSMOS (`configs/kosmos_tiny.yaml`) learns to caption handwritten digits with no pretrained weights at all. The
share of 100 held-out digits that it captions right to the letter, by training step, for each of the seeds
{", ".join(map(str, record["seeds"]))}; chance is 0.10:

{table}

Held-out caption loss after {STEPS} steps, nats a token, mean over the seeds: {losses}.

`.venv/bin/python benchmarks/vision_from_scratch.py` on {record["machine"]}, {record["date"]}.
The two remedies are `model.vision.position_embedding_std` and `model.resampler.query_key_gain`:
[decision 10](decisions/0010-vision-from-scratch.md).
"""


if __name__ == "__main__":
    typer.run(main)
