"""The last step of the quickstart: what it measured in summary.json, and a sheet of held-out digits with captions.

python tools/quickstart_summary.py --run runs/quickstart --seconds 300
"""

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from megatron_kosmos.cli.libraries import quiet_libraries
from megatron_kosmos.config import load_config
from megatron_kosmos.data.loading.loader import heldout_captions
from megatron_kosmos.engine.generate import Decoding, Generator
from megatron_kosmos.observability.captions import render_card

COLUMNS, ROWS = 6, 3


def main(
    run: Annotated[Path, typer.Option(help="Folder of the quickstart.")],
    seconds: Annotated[int, typer.Option(help="How long everything took.")],
) -> None:
    """Write summary.json and captions.png into the run's folder."""
    quiet_libraries()
    summary = summarize(run, seconds)
    caption_sheet(run).save(run / "captions.png")
    (run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def summarize(run: Path, seconds: int) -> dict[str, Any]:
    """Gather the figures from the files that the commands before wrote."""
    evaluation = json.loads((run / "evaluation.json").read_text())
    conversion = json.loads((run / "hf" / "conversion.json").read_text())
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "heldout_accuracy": evaluation["caption_exact_match"],
        "heldout_accuracy_shuffled_images": evaluation["caption_exact_match_shuffled"],
        "heldout_ranked_choice": evaluation["ranked_choice"],
        "heldout_text_loss": evaluation["loss"]["text"],
        "unigram_text_loss": evaluation["unigram_text_loss"],
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "steps": steps[-1]["step"],
        "seconds": seconds,
        "tokens_per_second": steps[-1]["tokens"] / sum(step["seconds_total"] for step in steps),
        "hf_max_abs_logit_diff": conversion["max_abs_logit_diff"],
    }


def caption_sheet(run: Path) -> Image.Image:
    """Return the first held-out pictures, each with the export's greedy caption beneath."""
    config = load_config(run / "config.yaml")
    (corpus,) = [corpus for corpus in config.data.heldout if corpus.kind == "caption"]
    pictures = [picture for picture, _ in heldout_captions(config.data, corpus, COLUMNS * ROWS)]
    generator = Generator.load(run / "hf")
    prompts = [config.evaluation.caption_prompt] * len(pictures)
    decoding = Decoding(max_new_tokens=config.evaluation.caption_tokens)
    captions = generator.generate(prompts, [[picture] for picture in pictures], decoding)
    cards = [
        render_card(picture.resize((128, 128), Image.Resampling.NEAREST), caption.strip())
        for picture, caption in zip(pictures, captions, strict=True)
    ]
    height, width = max(card.shape[0] for card in cards), max(card.shape[1] for card in cards)
    padded = [
        np.pad(card, ((0, height - card.shape[0]), (0, width - card.shape[1]), (0, 0)), constant_values=255)
        for card in cards
    ]
    rows = [np.concatenate(padded[start : start + COLUMNS], axis=1) for start in range(0, len(padded), COLUMNS)]
    return Image.fromarray(np.concatenate(rows, axis=0))


if __name__ == "__main__":
    typer.run(main)
