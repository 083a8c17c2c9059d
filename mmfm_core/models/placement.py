"""Where a model computes: on the processor, or on the first CUDA device that the process sees."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from mmfm_core.config.site import Device
from mmfm_core.errors import MmfmError

Module = TypeVar("Module", bound=nn.Module)


def placed(model: Module, device: Device) -> Module:
    """The model, moved to a device if it is not there. It was built on the processor, so it starts the same anywhere.

    Raises:
        MmfmError: there is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise MmfmError(
            "device: torch finds no CUDA device here; install a build of torch for it and let the process see it "
            "(nvidia-smi), or write 'device: cpu'"
        )
    return model.to(device)


@contextmanager
def generators(seed: int) -> Iterator[None]:
    """Torch's generators from a seed inside the block, and as they were after it: the processor's and a used device's.

    The same seed draws other numbers on another kind of device.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed(seed)
        yield
