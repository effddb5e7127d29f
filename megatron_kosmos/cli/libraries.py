"""What a command tells the libraries before it loads them."""

import os
import warnings


def quiet_libraries() -> None:
    """Keep libraries from warning, on every rank at every start, of kernels that are optional here, and from drawing
    progress bars for what takes a moment."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.jit")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
