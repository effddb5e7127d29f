"""`python tools/preprocess_data.py text|captions|interleaved|merge …`: the same as `kosmos preprocess`."""

from megatron_kosmos.cli.preprocess import commands

if __name__ == "__main__":
    commands()()
