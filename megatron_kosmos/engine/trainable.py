"""What of the whole model is trained, and how: the check of `optimizer.groups`, and the table at the start of a run."""

import io
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal, get_args

import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megatron_kosmos.config import ConfigError, RunConfig
from megatron_kosmos.model.kosmos import KosmosModel
from megatron_kosmos.model.names import NamedParameter, named_parameters
from megatron_kosmos.optim.groups import learning_rate_scale, weight_decay
from megatron_kosmos.parallel.topology import Topology

Part = Literal["embedding", "vision", "resampler", "decoder", "output"]
PARTS: tuple[Part, ...] = get_args(Part)
_PART_OF_PREFIX: dict[str, Part] = {"vision_tower": "vision", "output_layer": "output"}


@dataclass(frozen=True)
class Weight:
    """A parameter of the whole model."""

    name: str
    chunk: int
    """Number of the chunk that holds it, in model order."""
    num_elements: int
    """Those of all tensor-parallel ranks together."""
    is_trained: bool
    is_tied_copy: bool
    """Whether it is the last stage's copy of the tied embedding, whose name it bears."""

    @property
    def part(self) -> Part:
        """What it belongs to. A tied copy counts as output."""
        return "output" if self.is_tied_copy else part_of(self.name)


def part_of(name: str) -> Part:
    """Return what the parameter of a global `name` belongs to."""
    prefix = name.partition(".")[0]
    return _PART_OF_PREFIX.get(prefix, prefix)  # type: ignore[arg-type]


def weights_of(chunks: Iterable[KosmosModel]) -> list[Weight]:
    """Describe the parameters of a rank's chunks."""
    return [_describe(named, chunk) for chunk in chunks for named in named_parameters(chunk)]


def weights_of_model(chunks: Iterable[KosmosModel], topology: Topology) -> list[Weight]:
    """Describe the parameters of all pipeline stages, in the order of the stages. Gathers them over the stages."""
    stages: list[list[Weight]] = [[] for _ in range(topology.pp_size)]
    dist.all_gather_object(stages, weights_of(chunks), group=topology.pp_group)
    return [weight for stage in stages for weight in stage]


def _describe(named: NamedParameter, chunk: KosmosModel) -> Weight:
    parts = 1 if named.shard_dim is None else chunk.topology.tp_size
    return Weight(
        name=named.name,
        chunk=chunk.chunk.index,
        num_elements=named.parameter.numel() * parts,
        is_trained=named.parameter.requires_grad,
        is_tied_copy=named.is_tied_copy,
    )


def check_groups(run: RunConfig, weights: Sequence[Weight]) -> None:
    """Refuse patterns that match nothing in the whole model, and a model of which nothing is trained.

    Raises ConfigError with the same text wherever `weights` are the same.
    """
    names = list(dict.fromkeys(weight.name for weight in weights))
    problems = [
        f"optimizer.groups.{number}.parameters: {pattern!r} matches no parameter of the model{_closest(pattern, names)}"
        for number, group in enumerate(run.optimizer.groups)
        for pattern in group.parameters
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    if not any(weight.is_trained for weight in weights):
        raise ConfigError(
            "optimizer.groups freezes every parameter of the model, so there is nothing to train; name fewer in the "
            "groups with frozen=true, or put a group that is not frozen before them: the first that matches counts"
        )


def _closest(pattern: str, names: Sequence[str]) -> str:
    if fnmatchcase("output_layer.weight", pattern):
        return "; with decoder.tie_embeddings the output layer is embedding.word_embeddings.weight"
    close = get_close_matches(pattern, names, n=3, cutoff=0.3)
    return f"; the closest are {', '.join(close)}" if close else f"; names look like {names[0]}"


def trains_below(weights: Iterable[Weight], chunk: int) -> bool:
    """Whether a chunk before number `chunk` holds a trained weight."""
    return any(weight.is_trained and weight.chunk < chunk for weight in weights)


def describe_changes(weights: Sequence[Weight], trained_before: Collection[str]) -> list[str]:
    """Say what of the model is newly trained and what is newly frozen, since `trained_before` were trained."""
    numbers = {weight.name: weight.num_elements for weight in weights}
    trained = {weight.name for weight in weights if weight.is_trained}
    changes = {
        "newly trained, with moments of zero": [name for name in numbers if name in trained - set(trained_before)],
        "newly frozen, as saved": [name for name in numbers if name in set(trained_before) - trained],
    }
    return [
        f"{what}: {len(names)} tensors of {sum(numbers[name] for name in names):,} elements, {_listed(names)}"
        for what, names in changes.items()
        if names
    ]


def _listed(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@dataclass
class Row:
    """The weights of one part in one group."""

    part: Part
    group: int | None
    """Number in `optimizer.groups`, None for what no group matches."""
    trained_tensors: int = 0
    trained_elements: int = 0
    frozen_tensors: int = 0
    frozen_elements: int = 0


def rows(run: RunConfig, weights: Iterable[Weight]) -> list[Row]:
    """Count the weights by part and group. A tied embedding counts once, with the embedding."""
    counted: dict[tuple[Part, int | None], Row] = {}
    for weight in weights:
        if weight.is_tied_copy:
            continue
        key = (weight.part, run.optimizer.group_of(weight.name))
        row = counted.setdefault(key, Row(*key))
        if weight.is_trained:
            row.trained_tensors += 1
            row.trained_elements += weight.num_elements
        else:
            row.frozen_tensors += 1
            row.frozen_elements += weight.num_elements
    last = len(run.optimizer.groups)
    return sorted(counted.values(), key=lambda row: (PARTS.index(row.part), last if row.group is None else row.group))


def trainable_table(run: RunConfig, weights: Iterable[Weight]) -> Table:
    """Lay out what is trained and how, for 80 columns: numbers of elements, and of tensors in parentheses."""
    table = Table("part", "group", title="parameters of the model", box=SIMPLE_HEAD, pad_edge=False)
    table.title_justify = table.caption_justify = "left"
    table.collapse_padding = True
    for column in table.columns:
        column.no_wrap = True
    for header in ("trained", "frozen", "rate", "decay"):
        table.add_column(header, justify="right", no_wrap=True)
    everything = rows(run, weights)
    for row in everything:
        settings = ("", "")
        if row.trained_tensors:
            rate = run.optimizer.learning_rate * learning_rate_scale(run.optimizer, row.group)
            settings = (f"{rate:g}", f"{weight_decay(run.optimizer, row.group):g}")
        table.add_row(
            row.part,
            "" if row.group is None else str(row.group),
            _count(row.trained_elements, row.trained_tensors),
            _count(row.frozen_elements, row.frozen_tensors),
            *settings,
        )
    table.add_section()
    table.add_row(
        "all",
        "",
        _count(sum(row.trained_elements for row in everything), sum(row.trained_tensors for row in everything)),
        _count(sum(row.frozen_elements for row in everything), sum(row.frozen_tensors for row in everything)),
    )
    table.caption = (
        "elements (tensors); groups are numbered as in optimizer.groups;\n"
        "rate is the schedule's highest; biases, norms, latents, positions don't decay"
    )
    return table


def trainable_text(run: RunConfig, weights: Iterable[Weight]) -> str:
    """Return the table as lines of text, for a log."""
    lines = io.StringIO()
    Console(file=lines, width=80).print(trainable_table(run, weights))
    return "\n".join(line.rstrip() for line in lines.getvalue().splitlines())


def _count(num_elements: int, num_tensors: int) -> str:
    return f"{num_elements:,} ({num_tensors:,})" if num_tensors else "0"
