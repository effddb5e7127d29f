"""What a command tells the libraries before it loads them."""

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Keep libraries from warning, on every rank at every start, of kernels that are optional here, and from drawing
    progress bars for what takes a moment."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.jit")
    warnings.filterwarnings(
        "ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning
    )  # megatron-core's calls
    # Of a kernel for 4-bit inference; here bitsandbytes only keeps moments in 8 bits.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
