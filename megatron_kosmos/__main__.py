"""`python -m megatron_kosmos` is the `kosmos` command, for torchrun."""

from megatron_kosmos.cli.main import main

main()
