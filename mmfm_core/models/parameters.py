"""The parameter policy: every name of the state dict has one fate; FedAvg, FedPer or a local fusion are patterns."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from mmfm_core.config.federation import Fate, Federation
from mmfm_core.config.strict import did_you_mean
from mmfm_core.errors import MmfmError

ORDER: tuple[Fate, ...] = ("frozen", "local", "shared")  # the first list that matches decides

CONTROL = "control/"
"""Before a shared parameter's name, in messages and in what is kept: its control variate (SCAFFOLD)."""

ADAPTERS = ".lora_"  # in every name of an adapter's parameter, and in every pattern that means adapters


def fates_of(federation: Federation, names: Iterable[str]) -> dict[str, Fate]:
    """The fate of each name of a (possibly partial) model's state dict.

    What is said of adapters goes before what is said of the layers they stand beside: `frozen: [encoders.*]` with
    `shared: ["*.lora_*"]` freezes the trunk and shares the adapters in it.
    """
    lists = {fate: getattr(federation.parameters, fate) for fate in ORDER}
    of_adapters = {fate: [pattern for pattern in lists[fate] if ADAPTERS in pattern] for fate in ORDER}
    fates: dict[str, Fate] = {}
    for name in names:
        tries = (of_adapters, lists) if ADAPTERS in name else (lists,)
        fate = next((fate for said in tries for fate in ORDER if matches(name, said[fate])), None)
        if fate is None:
            raise MmfmError(
                f"parameters: '{name}' matches no pattern, so it has no fate; add it to shared, local or frozen"
            )
        fates[name] = fate
    return fates


def check_patterns(federation: Federation, names: Iterable[str]) -> None:
    """Check every pattern of the document against the full model's names.

    Raises:
        MmfmError: a name has no fate, a pattern matches nothing, or BatchNorm would be trained.
    """
    names = list(names)
    fates = fates_of(federation, names)
    for name in names:
        if name.endswith(".running_mean") and fates[name] != "frozen":
            raise MmfmError(
                f"parameters: '{name}' belongs to BatchNorm, which mixes the patients of a batch; freeze the trunk it "
                f"is in, for example frozen: ['{block_of(name)}.trunk.*']"
            )
    places = {f"parameters.{fate}": getattr(federation.parameters, fate) for fate in ORDER}
    places |= {f"stages.{index}.train": stage.train for index, stage in enumerate(federation.stages)}
    if federation.privacy:
        places["privacy.shrink"] = federation.privacy.shrink
    for place, patterns in places.items():
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                prefixes = {block_of(name) + ".*" for name in names}
                raise MmfmError(
                    f"{place}: the pattern '{pattern}' matches no parameter; {did_you_mean(pattern, prefixes)}"
                )


@dataclass(frozen=True)
class Block:
    """What one block of a model holds of one fate: numbers (buffers included) and bytes."""

    block: str
    fate: Fate
    parameters: int
    bytes: int


def blocks_of(federation: Federation, state: Mapping[str, np.ndarray]) -> list[Block]:
    """A model's size by block and fate, in the order of its state dict."""
    sizes: dict[tuple[str, Fate], list[int]] = defaultdict(lambda: [0, 0])
    for name, fate in fates_of(federation, state).items():
        sizes[block_of(name), fate][0] += state[name].size
        sizes[block_of(name), fate][1] += state[name].nbytes
    return [Block(name, fate, *size) for (name, fate), size in sizes.items()]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether any glob pattern matches the whole name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def block_of(name: str) -> str:
    """The unit of aggregation: `encoders.<modality>`, `fusion` or `heads.<task>`."""
    parts = name.split(".")
    return parts[0] if parts[0] == "fusion" else ".".join(parts[:2])


def held(fates: Mapping[str, Fate], fate: Fate) -> list[str]:
    """The names of one fate, in order."""
    return [name for name, given in fates.items() if given == fate]
