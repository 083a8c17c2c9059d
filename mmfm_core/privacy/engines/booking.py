"""One pass over a batch that books what goes into every trained layer, and the gradient of what comes out."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from mmfm_core.errors import MmfmError
from mmfm_core.privacy.engines.layer import Use


@dataclass(frozen=True)
class Call:
    """One call of a layer.

    Attributes:
        x: its input.
        version: of that, to see whether it was written over.
        inside: where the call lies in autograd's graph: its output's place, and its input's node if that is in it.
    """

    x: Tensor
    version: int
    inside: tuple[GradientEdge, Node | None]


def booked(
    layers: Mapping[str, nn.Module],
    losses: Callable[[], Tensor],
    weight: Tensor,
    parameters: Mapping[str, nn.Parameter],
) -> tuple[Tensor, dict[str, list[Use]]]:
    """The losses ([R]) of a batch, and the uses of each layer that the sum of `weight` ([R]) times them depends on.

    No weight's gradient is computed. What is booked lives as long as the answer: nothing of a pass is left to the next.

    Raises:
        MmfmError: a layer's input or output has another first dimension than the batch, or a parameter is reached past
            its layer.
    """
    calls: dict[str, list[Call]] = defaultdict(list)
    with _listening(layers, calls, len(weight)):
        found = losses()
    if not found.requires_grad:
        return found, {}
    _check_all_seen(found, [call for each in calls.values() for call in each], parameters)
    places = [(name, call) for name, each in calls.items() for call in each]
    gradients = torch.autograd.grad(
        (found * weight).sum(), [call.inside[0] for _, call in places], allow_unused=True, materialize_grads=False
    )
    uses: dict[str, list[Use]] = defaultdict(list)
    for (name, call), gradient in zip(places, gradients, strict=True):
        if gradient is not None:  # else nothing came of this call, as of an encoder that no task reads
            if call.x._version != call.version:
                raise refused(f"the input of '{name}' is written over after it was read")
            uses[name].append(Use(call.x, gradient))
    return found.detach(), uses


@contextmanager
def _listening(layers: Mapping[str, nn.Module], calls: Mapping[str, list[Call]], rows: int) -> Iterator[None]:
    def book(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Any) -> None:
        inputs = [*args, *kwargs.values()]
        if not (isinstance(y, Tensor) and len(inputs) == 1 and isinstance(inputs[0], Tensor)):
            raise refused(f"'{name}' takes or gives something else than one tensor")
        (x,) = inputs
        if not (x.ndim and y.ndim and len(x) == len(y) == rows):
            raise refused(f"'{name}' does not see one row per study")
        if y.requires_grad:
            calls[name].append(Call(x.detach(), x._version, (get_gradient_edge(y), x.grad_fn)))

    # An edge, not a tensor's hook: what is written over y later has a place of its own.
    handles = [
        module.register_forward_hook(
            lambda _, args, kwargs, y, name=name: book(name, args, kwargs, y), with_kwargs=True
        )
        for name, module in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_all_seen(losses: Tensor, calls: Collection[Call], parameters: Mapping[str, nn.Parameter]) -> None:
    """Walk from the losses to everything they depend on, but around the insides of the calls that were booked."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    around = {call.inside[0].node: call.inside[1] for call in calls}
    waiting: list[Node | None] = [losses.grad_fn]
    seen: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in around:
            waiting.append(around[node])
            continue
        if (leaf := getattr(node, "variable", None)) is not None and id(leaf) in names:
            raise refused(f"'{names[id(leaf)]}' is reached past the layer that owns it")
        waiting.extend(following for following, _ in node.next_functions)


def refused(reason: str) -> MmfmError:
    """What a model does that book-keeping does not see."""
    return MmfmError(f"clipping by book-keeping: {reason}; use the engine 'loop', which takes any model")
