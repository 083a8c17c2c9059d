"""Which models let hooks see the gradients of their patients, and which not, by name."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

ATTENTION = (nn.MultiheadAttention, NonDynamicallyQuantizableLinear)
UNKNOWN = (nn.RNNBase, nn.RNNCellBase, nn.EmbeddingBag)


@dataclass(frozen=True)
class Owner:
    """A layer and what is trained of it: the layer's own names, and those in the model."""

    module: nn.Module
    trained: dict[str, str]


def layers_of(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, Owner]:
    """The layers, by their names in the model, that own one of `parameters`."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    owners = {}
    for name, module in model.named_modules():
        # In every step, so without the many layers of `named_parameters`.
        trained = {
            each: names[id(parameter)] for each, parameter in module._parameters.items() if id(parameter) in names
        }
        if trained:
            owners[name] = Owner(module, trained)
    return owners


def unsupported(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> str | None:
    """Why hooks would miss or mix gradients of `parameters`, naming the layer; None where they do not."""
    return missed(model, layers_of(model, parameters), parameters)


def missed(model: nn.Module, layers: Mapping[str, Owner], parameters: Mapping[str, nn.Parameter]) -> str | None:
    """The same, where the layers that own the parameters are known."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            return f"'{name}' is {type(module).__name__}, which mixes the patients of a batch"
    owners = Counter(name for layer in layers.values() for name in layer.trained.values())
    for parameter in parameters:
        if owners[parameter] > 1:
            return f"'{parameter}' is tied: more than one layer owns it"
        if not owners[parameter]:
            return f"'{parameter}' belongs to no layer of the model"
    for name, layer in layers.items():
        if problem := _problem(layer.module):
            return f"'{name}' {problem}"
    return None


def _problem(module: nn.Module) -> str | None:
    kind = type(module).__name__
    below = [each for child in module.children() for each in (*child.parameters(), *child.buffers())]
    problems = {
        "is of torch's MultiheadAttention, which reads its weights past their layers": isinstance(module, ATTENTION),
        f"({kind}) holds a bare parameter beside other layers": bool(below),
        f"({kind}) has buffers, which may carry something from one patient to another": any(
            True for _ in module.buffers()
        ),
        f"is {kind}, for whose gradients per patient there is no function": isinstance(module, UNKNOWN),
        f"({kind}) rescales its rows over a batch, or has sparse gradients": isinstance(module, nn.Embedding)
        and bool(module.max_norm or module.scale_grad_by_freq or module.sparse),
        f"({kind}) has its weights computed before each call": bool(module._forward_pre_hooks),
    }
    return next((problem for problem, found in problems.items() if found), None)
