"""`kosmos doctor`: whether this machine, or every node of a job, is fit to train."""

import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_kosmos.cli.libraries import quiet_libraries
from megatron_kosmos.config import ConfigError, RunConfig, load_config

if TYPE_CHECKING:
    from megatron_kosmos.engine.doctor.judge_nodes import Needs
    from megatron_kosmos.engine.doctor.patient import Findings

ALONE_ON_CPU = 2
"""Processes that try the collectives on a machine without GPUs."""


def register(app: typer.Typer) -> None:
    """Add the command `doctor`."""
    app.command("doctor")(doctor)


def doctor(  # noqa: PLR0913 - a command's parameters are its options
    overrides: Annotated[list[str] | None, typer.Argument(metavar="a.b=c ...", help="Settings to change.")] = None,
    *,
    config: Annotated[list[Path] | None, typer.Option(help="YAML of a run, to be held against what is here.")] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Folder that the run writes to. [default: the run's, or .]")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs a node must have. [default: what is here]")] = None,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="Train on CPUs, with --gpus processes a node; no GPU is used.")
    ] = False,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the job; the command runs once on each.")] = 1,
    node: Annotated[int, typer.Option(min=0, envvar="SLURM_NODEID", help="Number of this node.")] = 0,
    node_name: Annotated[
        str, typer.Option(envvar="SLURMD_NODENAME", help="Name of this node. [default: its own]")
    ] = "",
    names: Annotated[str, typer.Option(help="Names of all nodes, with commas: those that don't come are named.")] = "",
    head: Annotated[str, typer.Option(envvar="MASTER_ADDR", help="Name or address of node 0.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, envvar="MASTER_PORT", help="Port of node 0 to meet at.")] = 0,
    timeout: Annotated[float, typer.Option(min=1, help="Longest wait for what doesn't come, in seconds.")] = 60.0,
) -> None:
    """Look at versions, GPUs, kernels, memory, disk, clocks and collectives, and say what to do about what is bad.

    Alone, it looks at this machine. In a job, one process on each node: srun --ntasks-per-node=1 --kill-on-bad-exit=0
    kosmos doctor --nodes 8 --gpus 8 --run-dir RUN --names "$(scontrol show hostnames | paste -sd,)"
    """
    if nodes > 1 and (node >= nodes or port == 0 or gpus is None):
        raise typer.BadParameter(
            "several nodes need --gpus, --port (MASTER_PORT) other than 0, and --node (SLURM_NODEID) below --nodes; "
            f"here: --gpus {gpus}, --port {port}, --node {node}, --nodes {nodes}"
        )
    every_name = tuple(name for name in names.split(",") if name)
    if every_name and len(every_name) != nodes:
        raise typer.BadParameter(f"--names has {len(every_name)} names, and --nodes is {nodes}")
    if overrides and not config:
        raise typer.BadParameter(f"{overrides[0]} changes a setting of a --config, and none is given")
    # What torch would warn of when a wait is over, the doctor says itself.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        import torch
    except (ImportError, OSError) as error:
        sys.exit(f"kosmos doctor: {node_name or socket.gethostname()}: torch doesn't load: {error}; make install there")

    from megatron_kosmos.engine.doctor.examine import examine
    from megatron_kosmos.engine.doctor.meeting import Place
    from megatron_kosmos.engine.doctor.patient import Wanted

    run, refusal = None, ""
    try:
        run = load_config(config, overrides or []) if config else None
    except ConfigError as error:
        refusal = str(error)  # told by the first node, with the names of the nodes where it is so
    has_gpus = torch.cuda.device_count() > 0
    on_cpu = cpu or (gpus is None and not has_gpus)
    alone = nodes == 1
    place = Place(
        node=0 if alone else node,
        num_nodes=nodes,
        name=node_name or socket.gethostname(),
        # A machine alone meets nobody, whatever a job around it has set.
        head="127.0.0.1" if alone else head,
        port=0 if alone else port,
        names=every_name,
    )
    wanted = Wanted(
        num_workers=gpus or (ALONE_ON_CPU if on_cpu else torch.cuda.device_count()),
        on_cpu=on_cpu,
        run_dir=run_dir or (run.run_dir if run else Path()),
        timeout_seconds=timeout,
        run=run,
        refusal=refusal,
        plan_needs=_plan_needs,
    )
    findings = examine(place, wanted)
    _print(findings, f"{nodes} x {wanted.num_workers} {'processes' if on_cpu else 'GPUs'}, {wanted.run_dir.absolute()}")
    # Without Python's own leave-taking, which would wait for a process that sits in a GPU's driver.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if findings.is_good else 1)


def _print(findings: "Findings", title: str) -> None:
    if not findings.checks:
        return
    from rich.console import Console

    from megatron_kosmos.engine.doctor.checks import render

    # A job's log has no width of its own.
    render(findings.checks, title, Console(width=None if sys.stdout.isatty() else 120))


def _plan_needs(run: RunConfig, world_size: int) -> "Needs":
    """Load the stack, and plan."""
    quiet_libraries()
    from megatron_kosmos.engine.doctor.needs import needs_of

    return needs_of(run, world_size)
