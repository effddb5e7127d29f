"""Does a run learn from each kind of document? Its losses against what guessing by word frequency gets.

    .venv/bin/python benchmarks/losses_by_source.py --run runs/debian --figure docs/images/debian_losses.svg

The measure is the entropy of the tokens that count in the loss, each for itself (unigrams), in the corpora of a kind:
no model that ignores context gets below it. Prints a table and writes results/losses_by_source.json, and the figure.

Shape letters: V vocabulary.
"""

import json
import os
import platform
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from lxml import etree
from lxml.builder import E
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from megatron_kosmos.config import RunConfig, load_config
from megatron_kosmos.data.corpora.corpus import Corpus
from megatron_kosmos.data.loading.heldout_split import documents_of
from megatron_kosmos.data.tokenization.tokenizer import KosmosTokenizer
from megatron_kosmos.prompt import SourceKind

RESULTS = Path(__file__).parent / "results" / "losses_by_source.json"
COLOURS: dict[SourceKind, str] = {"text": "#1f77b4", "caption": "#d62728", "interleaved": "#2ca02c"}
SMOOTHED_STEPS = 10
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM = 760, 360, 50, 240, 40
"""Pixels of the figure, and of its margins."""


def main(
    run: Annotated[Path, typer.Option(help="Folder of a run, with config.yaml and metrics.jsonl.")],
    figure: Annotated[Path | None, typer.Option(help="SVG file to write.")] = None,
) -> None:
    """Print losses and unigram entropies, in nats a token."""
    config = load_config(run / "config.yaml")
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kinds = list(dict.fromkeys(corpus.kind for corpus in config.data.train))
    entropies = {kind: unigram_entropy(config, kind) for kind in kinds}
    losses = {kind: smoothed([step[f"loss_{kind}"] for step in steps]) for kind in kinds}
    heldout = [step for step in steps if "heldout_loss_text" in step]
    rows = [
        {
            "source": kind,
            "unigram entropy": entropies[kind],
            "loss of the first step": steps[0][f"loss_{kind}"],
            f"mean of the last {SMOOTHED_STEPS}": float(losses[kind][-1]),
            "held out at the end": heldout[-1][f"heldout_loss_{kind}"] if heldout else None,
        }
        for kind in kinds
    ]
    table = Table(*rows[0], title=f"{run}, {len(steps)} steps, nats a token")
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine, "steps": len(steps), "losses": rows}, indent=2) + "\n")
    if figure is not None:
        figure.write_bytes(draw(losses, entropies))


def unigram_entropy(config: RunConfig, kind: SourceKind) -> float:
    """Return the entropy, in nats, of the targets in the training documents of a kind."""
    tokenizer = KosmosTokenizer.load(config.data.tokenizer)
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for entry in config.data.train:
        if entry.kind == kind:
            corpus = Corpus(entry, tokenizer)
            documents = documents_of(corpus, entry, "train")
            every = range(len(corpus)) if documents is None else documents.tolist()
            tokens = np.concatenate([corpus.tokens(document) for document in every])
            counts += np.bincount(tokens, minlength=tokenizer.vocab_size)
    counts[[tokenizer.bos_id, tokenizer.image_id, tokenizer.end_of_image_id]] = 0
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def smoothed(losses: list[float | None]) -> NDArray[np.float64]:
    """Return the mean of each step and the ones before it; steps without a token of the kind don't count."""
    values = np.array([np.nan if loss is None else loss for loss in losses])
    return np.array([np.nanmean(values[max(0, i + 1 - SMOOTHED_STEPS) : i + 1]) for i in range(len(values))])


def draw(losses: dict[SourceKind, NDArray[np.float64]], entropies: dict[SourceKind, float]) -> bytes:
    """Return the figure: a line for the loss of each kind, a dashed one for its unigram entropy."""
    num_steps = max(map(len, losses.values()))
    top = float(np.ceil(max(values.max() for values in losses.values())))
    x = [LEFT + (WIDTH - LEFT - RIGHT) * step / num_steps for step in range(num_steps + 1)]

    def y(loss: float) -> float:
        return round(10 + (HEIGHT - BOTTOM - 10) * (1 - loss / top), 1)

    drawing = E.svg(
        E.rect(width="100%", height="100%", fill="white"),
        xmlns="http://www.w3.org/2000/svg",
        width=str(WIDTH),
        height=str(HEIGHT),
        **{"font-family": "sans-serif", "font-size": "12"},
    )
    for tick in range(0, int(top) + 1, 2):
        drawing.append(line(x[0], y(tick), x[-1], y(tick), stroke="#ddd"))
        drawing.append(label(x[0] - 24, y(tick) + 4, str(tick)))
    for step in range(0, num_steps + 1, max(1, num_steps // 5)):
        drawing.append(label(x[step] - 8, HEIGHT - BOTTOM + 18, str(step)))
    drawing.append(label((x[0] + x[-1]) / 2 - 60, HEIGHT - 6, "step; nats a token"))
    # Labels stand where the lines end, the lower below the higher.
    ends = sorted(((float(values[-1]), kind) for kind, values in losses.items()), reverse=True)
    place = -np.inf
    for loss, kind in ends:
        values = losses[kind]
        points = " ".join(f"{x[step + 1]:.1f},{y(value)}" for step, value in enumerate(values))
        drawing.append(E.polyline(points=points, fill="none", stroke=COLOURS[kind], **{"stroke-width": "1.6"}))
        height = y(entropies[kind])
        drawing.append(line(x[0], height, x[-1], height, stroke=COLOURS[kind], **{"stroke-dasharray": "5 4"}))
        place = max(place + 16, y(loss) + 4)
        drawing.append(label(x[-1] + 8, place, f"{kind} {loss:.2f} (unigrams {entropies[kind]:.2f})", COLOURS[kind]))
    return bytes(etree.tostring(drawing, pretty_print=True))


def line(x1: float, y1: float, x2: float, y2: float, **style: str) -> Any:
    """Return a line."""
    return E.line(x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", **style)


def label(x: float, y: float, text: str, colour: str = "#333") -> Any:
    """Return a text."""
    return E.text(text, x=f"{x:.1f}", y=f"{y:.1f}", fill=colour)


if __name__ == "__main__":
    typer.run(main)
