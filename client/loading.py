"""Between a model and the arrays that travel and are kept."""

import torch

from mmfm_core.models.model import MultimodalModel
from mmfm_core.storage import Tensors


def arrays(model: MultimodalModel) -> Tensors:
    """A copy of the model's state dict as arrays."""
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in model.state_dict().items()}


def load(model: MultimodalModel, state: Tensors) -> None:
    """Set the model's whole state."""
    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in state.items()})
