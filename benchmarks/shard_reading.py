"""How fast do pictures' bytes come out of tar shards, against webdataset? Writes results/shard_reading.json.

    .venv/bin/python benchmarks/shard_reading.py

CPU seconds of one thread, the file in the page cache, alternating, median of the rounds. Both ways read all pictures of
a shard in order; ours reads them in a random order as well, which webdataset cannot.
"""

import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
import webdataset
from rich.console import Console
from rich.table import Table
from shards import write_shards

from megatron_kosmos.data.corpora.image_store import ImageStore

RESULTS = Path(__file__).parent / "results" / "shard_reading.json"


def main(
    pictures: Annotated[int, typer.Option(help="Pictures in the shard.")] = 5_000,
    kilobytes: Annotated[int, typer.Option(help="Size of a picture; img2dataset's of 256 pixels have about 20.")] = 20,
    rounds: Annotated[int, typer.Option(help="Times that each way reads all pictures.")] = 5,
) -> None:
    """Measure, print a table and write it."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "a"
        draw = np.random.default_rng(0)
        write_shards(prefix, (draw.bytes(kilobytes << 10) for _ in range(pictures)), "jpg")
        order = np.random.default_rng(0).permutation(pictures).tolist()
        ways: dict[str, Callable[[], Iterator[bytes]]] = {
            "webdataset": lambda: by_webdataset(prefix),
            "offset index": lambda: by_index(prefix, range(pictures)),
            "offset index, random order": lambda: by_index(prefix, order),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds + 1):
            for name, way in ways.items():
                start = time.process_time()
                assert sum(map(len, way())) == pictures * (kilobytes << 10)
                seconds[name].append(time.process_time() - start)
    speeds = {name: pictures / statistics.median(times[1:]) for name, times in seconds.items()}
    table = Table("way", "pictures per CPU second", "ratio to webdataset")
    for name, speed in speeds.items():
        table.add_row(name, f"{speed:,.0f}", f"{speed / speeds['webdataset']:.1f}")
    Console().print(table)
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    RESULTS.parent.mkdir(exist_ok=True)
    result = {
        "machine": machine,
        "webdataset": webdataset.__version__,
        "pictures": pictures,
        "kilobytes": kilobytes,
        "per_cpu_second": speeds,
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


def by_index(prefix: Path, numbers: range | list[int]) -> Iterator[bytes]:
    """Yield pictures as training reads them."""
    store = ImageStore(prefix)
    for number in numbers:
        yield store.read(number)


def by_webdataset(prefix: Path) -> Iterator[bytes]:
    """Yield pictures as webdataset reads them."""
    shard = str(prefix.with_name(f"{prefix.name}-images-00000.tar"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = webdataset.WebDataset(shard, shardshuffle=False, empty_check=False)
    for sample in samples:
        (data,) = (value for key, value in sample.items() if not key.startswith("__"))
        yield data


if __name__ == "__main__":
    typer.run(main)
