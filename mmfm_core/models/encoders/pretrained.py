"""Starting from a foundation model: checkpoints of timm, transformers and MONAI, read from the folder of pinned files.

Only safetensors are read: they hold tensors and nothing that could run.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from timm.models import adapt_input_conv
from torch import Tensor, nn
from transformers import BertModel
from transformers.utils import logging as transformers_logging

from mmfm_core.artifacts import find
from mmfm_core.config.model import Artifact
from mmfm_core.errors import MmfmError

State = dict[str, Tensor]


def place_of(artifacts: Path, artifact: Artifact, field: str) -> Path:
    """Where a site has a checkpoint; what `find` refuses is said of `field`."""
    try:
        return find(artifacts, artifact)
    except MmfmError as error:
        raise MmfmError(f"{field}: {error}") from error


def tensors(artifacts: Path, artifact: Artifact, field: str) -> State:
    """The tensors of a checkpoint file.

    Raises:
        MmfmError: it is missing, is another file than the document pins, or is no safetensors file.
    """
    path = place_of(artifacts, artifact, field)
    try:
        return safetensors.torch.load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise MmfmError(
            f"{field}: '{artifact.path}' is not a safetensors file; save the checkpoint's state dict with "
            "safetensors.torch.save_file"
        ) from error


def into_timm(trunk: nn.Module, state: State, field: str) -> None:
    """Load a timm state dict: classifier dropped, first convolution and positions resized as timm itself does.

    Not `timm.create_model(pretrained=True)`: it only logs what a file lacks.

    Raises:
        MmfmError: the state dict is of another architecture.
    """
    convert = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    published = trunk.pretrained_cfg
    assert isinstance(published, dict)
    try:
        state = convert(state, trunk) if convert else state
    except Exception as error:  # it indexes what a file of this architecture has
        raise MmfmError(f"{field}: is not a checkpoint of this architecture; name the one it was made with") from error
    for classifier in _listed(published.get("classifier")):
        state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{classifier}.")}
    own = trunk.state_dict()
    for conv in _listed(published.get("first_conv")):
        name = f"{conv}.weight"
        if name in state and name in own and state[name].shape[1:2] == (3,) != own[name].shape[1:2]:
            state[name] = adapt_input_conv(own[name].shape[1], state[name])
    fit(trunk, state, field)


def into_monai_vit(vit: nn.Module, position: nn.Embedding, state: State, field: str) -> None:
    """Load the state dict of a `monai.networks.nets.ViT`, with its positions as an embedding.

    A grid of another shape is refused: the file does not say how its positions lie, and MONAI has no function for it.

    Raises:
        MmfmError: the state dict is of another architecture.
    """
    theirs = "patch_embedding.position_embeddings"
    # Older MONAI made cross-attention that its forward never used; `norm_cross_attn` is still made and unused.
    ours = {name: tensor for name, tensor in state.items() if "cross_attn" not in name and name != theirs}
    if theirs not in state or state[theirs].shape[1:] != position.weight.shape:
        raise MmfmError(_unlike(field, theirs, state, {theirs: position.weight[None]}))
    fit(vit, ours, field)
    fit(position, {"weight": state[theirs][0]}, field)


def bert(artifacts: Path, artifact: Artifact, field: str) -> BertModel:
    """A BERT from a transformers folder (`config.json` and `model.safetensors`), without its pooler.

    Raises:
        MmfmError: the folder is missing, is another one than the document pins, or does not hold a BERT.
    """
    folder = place_of(artifacts, artifact, field)
    try:
        kind = json.loads((folder / "config.json").read_text("utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise MmfmError(
            f"{field}: '{artifact.path}' must be a folder with config.json and model.safetensors, as save_pretrained "
            "writes it"
        ) from error
    if kind != "bert":
        raise MmfmError(f"{field}: '{artifact.path}' is of type '{kind}' in its config.json, and must be a 'bert'")
    try:
        with _quiet():
            model, found = BertModel.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                add_pooling_layer=False,
                dtype="float32",
                ignore_mismatched_sizes=True,  # reported below, in a sentence
                output_loading_info=True,
            )
    except Exception as error:  # transformers raises whatever its parts do
        raise MmfmError(
            f"{field}: '{artifact.path}' cannot be read as a BERT; export it with save_pretrained"
        ) from error
    mismatched = sorted(name for name, *_ in found["mismatched_keys"])
    for name in [*sorted(found["missing_keys"]), *mismatched]:
        raise MmfmError(
            f"{field}: '{artifact.path}' does not hold '{name}' in the shape that its config.json says; export it again"
        )
    return model


def fit(module: nn.Module, state: State, field: str) -> None:
    """Load a state dict that must have a module's names and shapes, no more and no less.

    Raises:
        MmfmError: naming the first tensor that is missing, left over, or of another shape.
    """
    own = module.state_dict()
    for name in [*own, *state]:
        if name not in own or name not in state or own[name].shape != state[name].shape:
            raise MmfmError(_unlike(field, name, state, own))
    module.load_state_dict(state)


def _unlike(field: str, name: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    here, there = (f"{list(tensors[name].shape)}" if name in tensors else "none" for tensors in (own, state))
    return (
        f"{field}: the checkpoint is of another architecture: for '{name}' the model has {here} and the file {there}; "
        "describe the encoder as the checkpoint's, or name another file"
    )


def _listed(names: str | tuple[str, ...] | list[str] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())


@contextmanager
def _quiet() -> Iterator[None]:
    # transformers draws a progress bar and a table of left-out heads on the screen of whoever builds a model.
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
