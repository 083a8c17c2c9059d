"""Between a model and the arrays that travel and are kept."""

from weakref import WeakKeyDictionary

import numpy as np
import torch

from mmfm_core.models.model import MultimodalModel
from mmfm_core.storage import Tensors

_states: WeakKeyDictionary[MultimodalModel, Tensors] = WeakKeyDictionary()
_built: WeakKeyDictionary[MultimodalModel, Tensors] = WeakKeyDictionary()


def arrays(model: MultimodalModel) -> Tensors:
    """A copy of the model's state dict as arrays."""
    if model.device.type != "cpu":
        return {name: tensor.numpy(force=True) for name, tensor in model.state_dict().items()}
    return {name: own.copy() for name, own in _state(model).items()}


def initial(model: MultimodalModel) -> Tensors:
    """The state that a model was built with, whatever became of it since this was first asked; not to be written to."""
    if model not in _built:
        _built[model] = arrays(model)
    return _built[model]


def load(model: MultimodalModel, state: Tensors) -> None:
    """Set the model's whole state."""
    if model.device.type != "cpu":
        model.load_state_dict(
            {name: torch.from_numpy(np.require(array, requirements="W")) for name, array in state.items()}
        )
        return
    own = _state(model)
    assert own.keys() == state.keys()
    for name, array in state.items():
        np.copyto(own[name], array)


def _state(model: MultimodalModel) -> Tensors:
    # These are the model's own memory, and no part of a model is ever exchanged: one walk through it will do.
    if model not in _states:
        _states[model] = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return _states[model]
