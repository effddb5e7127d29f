"""A run's numbers over time: one JSON object a step in metrics.jsonl, the same scalars in TensorBoard and in trackers.

Shape letters: I images, S image side in pixels.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from megatron_kosmos.observability.captions import render_card, to_picture
from megatron_kosmos.observability.trackers import TrackerThread

Scalar = float | int | None

GROUPS: Final = {
    "loss": "loss/total",
    "lr": "optimizer/lr",
    "grad_norm": "optimizer/grad_norm",
    "tokens": "data/tokens",
    "images": "data/images",
    "packing_efficiency": "data/packing_efficiency",
    "documents_cut": "data/documents_cut",
    "image_text_ratio": "data/image_text_ratio",
    "target_tokens": "data/target_tokens",
    "tokens_per_second": "speed/tokens_per_second",
    "images_per_second": "speed/images_per_second",
    "mfu": "speed/mfu",
    "seconds_left": "speed/seconds_left",
}
GROUP_PREFIXES: Final = ("loss", "heldout", "seconds", "share", "rank", "memory")
LAYOUT: Final = {
    "loss": {
        "by source": ["Multiline", ["^loss/.*"]],
        "held out": ["Multiline", ["^heldout/loss_.*"]],
    },
    "time": {
        "share of each part of a step": ["Multiline", ["^share/.*"]],
        "ranks: worst and median": ["Multiline", ["^rank/seconds_.*"]],
    },
    "memory": {"largest of the ranks, bytes": ["Multiline", ["^memory/.*"]]},
}
"""TensorBoard's custom scalars: curves that belong into one picture, by patterns over tags."""


def tensorboard_tag(name: str) -> str:
    """Return the grouped name of a metric: `loss_text` is `loss/text`, `lr` is `optimizer/lr`."""
    if name in GROUPS:
        return GROUPS[name]
    group, _, rest = name.partition("_")
    return f"{group}/{rest}" if rest and group in GROUP_PREFIXES else f"other/{name}"


class MetricsError(ValueError):
    """A run's metrics that cannot be gone on with; the message names file and line."""


class MetricsWriter:
    """Writes run_dir/metrics.jsonl and run_dir/tensorboard; on rank 0 only.

    `first_step` is the first step that this process will write. What an earlier process wrote at or after it, having
    gone on after its last checkpoint, is dropped from both, so that a resumed run's series has every step once.
    Raises MetricsError where what is there is damaged.
    """

    def __init__(self, run_dir: Path, first_step: int = 0, trackers: Sequence[TrackerThread] = ()) -> None:
        """`trackers` get the same scalars, and are closed with this."""
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / "metrics.jsonl"
        self._last_step = drop_steps_from(self.path, first_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)
        self._tensorboard.add_custom_scalars(LAYOUT)
        self._trackers = trackers

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def write(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        """Append the metrics of `step`; they are on disk (or on their way there) when this returns.

        JSON has no NaN and no infinity: such a value is written as null and its name listed under `nonfinite`. None
        stands for a value that does not exist, such as `mfu` on a CPU. Raises ValueError unless `step` is later than
        every step written before.
        """
        if step <= self._last_step:
            raise ValueError(f"{self.path}: step {step} comes after step {self._last_step}; a step is written once")
        finite = {name: value for name, value in scalars.items() if value is None or math.isfinite(value)}
        line: dict[str, object] = {"step": step} | {name: finite.get(name) for name in scalars}
        if nonfinite := [name for name in scalars if name not in finite]:
            line["nonfinite"] = nonfinite
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        self._last_step = step
        points = {tensorboard_tag(name): value for name, value in scalars.items() if value is not None}
        for tag, value in points.items():
            self._tensorboard.add_scalar(tag, value, step)
        for tracker in self._trackers:
            tracker.log(step, points)

    def images_with_captions(self, tag: str, step: int, images: Tensor, captions: Sequence[str]) -> None:
        """Show `images` [I, 3, S, S], normalized as in a `MultimodalBatch`, in TensorBoard with a caption beneath each.

        The captions also stand in the text tab, one a line. Raises ValueError when there is not one for each image.
        """
        if len(captions) != len(images):
            raise ValueError(f"{tag}: {len(images)} images but {len(captions)} captions")
        for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
            card = render_card(to_picture(image), caption)
            self._tensorboard.add_image(f"{tag}/{index}", card, step, dataformats="HWC")
        listing = "\n".join(f"{index}. {caption}" for index, caption in enumerate(captions))
        self._tensorboard.add_text(tag, listing, step)

    def close(self) -> None:
        """Write what is pending and close both files."""
        self._file.close()
        self._tensorboard.close()
        for tracker in self._trackers:
            tracker.close()


def drop_steps_from(path: Path, first_step: int) -> int:
    """Rewrite the metrics at `path` without the steps from `first_step` on; return the last step kept, or -1.

    A last line that a killed process left unfinished is dropped too. A broken line before it raises MetricsError, with
    its number, and leaves the file as it is.
    """
    if not path.exists():
        return -1
    lines = path.read_text(encoding="utf-8", errors="backslashreplace").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    kept, last_step = [], -1
    for number, line in enumerate(lines, start=1):
        try:
            step = int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise MetricsError(f"{path}:{number} is not a line of metrics ({error}); move the file away") from error
        if step < first_step:
            kept.append(line)
            last_step = step
    rewritten = path.with_suffix(".jsonl.tmp")
    rewritten.write_text("".join(kept), encoding="utf-8")
    os.replace(rewritten, path)
    return last_step
