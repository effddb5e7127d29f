"""Which of the optimizer's optional libraries are there. Imports none of them, nor torch."""

from importlib.metadata import PackageNotFoundError, version

from megatron_kosmos.config import ConfigError, OptimizerConfig

_OLDEST_BITSANDBYTES = (0, 50)
"""The first release whose 8-bit AdamW runs on the CPU too."""


def check_installed(optimizer: OptimizerConfig) -> None:
    """Raise ConfigError, with how to install it, where `optimizer.kind` needs a library that is absent or too old."""
    if optimizer.kind != "adamw_8bit":
        return
    try:
        found = version("bitsandbytes")
    except PackageNotFoundError:
        found = None
    if found is None or tuple(int(part) for part in found.split(".")[:2]) < _OLDEST_BITSANDBYTES:
        oldest = ".".join(str(part) for part in _OLDEST_BITSANDBYTES)
        raise ConfigError(
            f"optimizer.kind=adamw_8bit needs bitsandbytes >= {oldest}, and this Python has "
            f"{found or 'none'}: pip install 'megatron-kosmos[eight-bit]' (from a clone: "
            f"pip install -e '.[eight-bit]'), or set optimizer.kind=adamw"
        )
