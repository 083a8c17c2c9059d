"""Low-rank adapters (LoRA, Hu et al. 2022) on encoders and fusion, by peft; several side by side, all of them active.

A shared and a local one together are Med-DualLoRA and FedDAT: their parameters are told apart by name,
`*.lora_*.<adapter>.*`.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase

from torch import nn

from mmfm_core.config.model import Adapter
from mmfm_core.config.strict import did_you_mean
from mmfm_core.errors import MmfmError

ADAPTABLE = (nn.Linear, nn.Conv2d, nn.Conv3d)


def add_adapters(
    blocks: Mapping[str, nn.Module],
    adapters: Mapping[str, Adapter],
    seeded: Callable[..., AbstractContextManager[None]],
) -> None:
    """Put every adapter beside the layers that its patterns name; until it is trained it changes nothing.

    `blocks` are encoders and fusion by their prefix in the state dict; `seeded` starts the random generator from the
    names of an adapter and a block, so that an adapter starts the same wherever the block is built.
    """
    if not adapters:
        return
    from peft import LoraConfig, inject_adapter_in_model  # and with it transformers: seconds
    from peft.tuners.tuners_utils import BaseTunerLayer

    flags = {parameter: parameter.requires_grad for block in blocks.values() for parameter in block.parameters()}
    named = {prefix: _layers(block) for prefix, block in blocks.items()}
    for name, adapter in adapters.items():
        for prefix, block in blocks.items():
            layers = [layer for layer in named[prefix] if _any(f"{prefix}.{layer}", adapter.targets)]
            if layers:
                # As one expression: peft takes a list of names for endings of names.
                targets = "|".join(re.escape(layer) for layer in layers)
                lora = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=targets)
                with seeded("adapters", name, prefix), warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second adapter is meant
                    inject_adapter_in_model(lora, block, name)
    for block in blocks.values():
        for module in block.modules():
            if isinstance(module, BaseTunerLayer):
                module.set_adapter(list(adapters))
    # peft freezes everything else; here a document's patterns decide.
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)


def check_targets(blocks: Mapping[str, nn.Module], adapters: Mapping[str, Adapter]) -> None:
    """Check that every pattern names a layer; `blocks` are those of the whole model, before adapters.

    Raises:
        MmfmError: a pattern matches no layer that can be adapted.
    """
    known = [f"{prefix}.{layer}" for prefix, block in blocks.items() for layer in _layers(block)]
    for name, adapter in adapters.items():
        for pattern in adapter.targets:
            if not any(fnmatchcase(layer, pattern) for layer in known):
                raise MmfmError(
                    f"model.adapters.{name}.targets: '{pattern}' matches no linear or convolutional layer of an "
                    f"encoder or the fusion; {did_you_mean(pattern, known)}"
                )


def _layers(block: nn.Module) -> list[str]:
    # Exact types: a subclass may read its weight in its own way (torch's own attention does).
    return [
        name
        for name, module in block.named_modules()
        if name and type(module) in ADAPTABLE and getattr(module, "groups", 1) == 1
    ]


def _any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
