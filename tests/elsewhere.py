"""A CUDA device that is not there: tensors that say they are on one, and whose values are on the processor.

An operation over tensors of both places fails, as it does on a real device, so that a model can be tested for it where
there is none. Forward only: torch's backward asks the device itself.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Elsewhere(Tensor):
    """A tensor on the device."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> "Elsewhere":
        made = Tensor._make_wrapper_subclass(cls, here.size(), strides=here.stride(), dtype=here.dtype, device=DEVICE)
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return carried_out(operation, args, kwargs or {})

    # What torch does in its binding to Python, where it asks the device itself.
    def __getitem__(self, index: Any) -> Tensor:
        return there(self.here[tree_map(values, index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        assert not isinstance(value, Tensor) or isinstance(value, Elsewhere) or not value.ndim, "tensors on two devices"
        self.here[tree_map(values, index)] = values(value)

    def __invert__(self) -> Tensor:
        return there(~self.here)

    def nonzero(self) -> Tensor:
        return there(self.here.nonzero())

    def new_tensor(self, *data: Any, **options: Any) -> Tensor:
        return there(self.here.new_tensor(*data, **options))

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        return there(self.here.contiguous(memory_format=memory_format))

    def tolist(self) -> Any:
        return self.here.tolist()

    item = tolist  # of one value

    def __bool__(self) -> bool:
        return bool(self.here)

    def __int__(self) -> int:
        return int(self.here)

    def __float__(self) -> float:
        return float(self.here)

    def __repr__(self) -> str:
        return f"Elsewhere({self.here!r})"


class TwoPlaces(TorchDispatchMode):
    """What is asked for on the device is made there."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return carried_out(operation, args, kwargs or {})


def there(x: Any) -> Any:
    """On the device."""
    return Elsewhere(x) if isinstance(x, Tensor) and not isinstance(x, Elsewhere) else x


def values(x: Any) -> Any:
    """On the processor."""
    if isinstance(x, slice):
        return slice(values(x.start), values(x.stop), values(x.step))
    return x.here if isinstance(x, Elsewhere) else x


def carried_out(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the values; on the device where its tensors are, or where it is asked for."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    moved = any(isinstance(tensor, Elsewhere) for tensor in tensors)
    if moved and operation not in MOVES:
        left = [tuple(t.shape) for t in tensors if t.ndim and not isinstance(t, Elsewhere)]
        if left and not (operation is torch.ops.aten.index.Tensor and isinstance(args[0], Elsewhere)):
            raise RuntimeError(f"{operation}: tensors on two devices; on the processor: {left}")
    asked = kwargs.get("device")
    if asked is not None:
        moved, kwargs = torch.device(asked).type == DEVICE.type, kwargs | {"device": torch.device("cpu")}
    result = operation(*tree_map(values, args), **tree_map(values, kwargs))
    if operation is torch.ops.aten.copy_.default:
        return args[0]
    return tree_map(there, result) if moved else result


@contextmanager
def on_the_device(module: nn.Module) -> Iterator[None]:
    """A module's parameters and buffers are on the device from here on; inside the block it computes there."""
    for part in module.modules():
        for kept in (part._parameters, part._buffers):
            for name, tensor in kept.items():
                kept[name] = None if tensor is None else there(tensor.detach())
    bound = [patch.object(torch, name, _factory(getattr(torch, name))) for name in ("tensor", "as_tensor")]
    with ExitStack() as stack:
        for patched in (patch.object(torch.cuda, "_lazy_init"), *bound, torch.no_grad(), TwoPlaces()):
            stack.enter_context(patched)
        yield


def _factory(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One that torch binds to Python without asking what carries operations out."""

    def made(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        result = make(data, **options)
        asked: Tensor = there(result) if device is not None and torch.device(device).type == DEVICE.type else result
        return asked

    return made
