"""The methods that `mmfm compare` knows: each is a few lines in the document; the code of models knows none."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmfm_core.config import Federation
from mmfm_core.config.federation import Stage
from mmfm_core.errors import MmfmError
from server import baselines

REFERENCE = "adapted"
"""What every other method is compared with: the baseline that must always be run."""

Lines = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        title: as tables name it.
        lines: what replaces the document's own, by top-level entry; `stages` goes into every federated stage.
        source: the paper.
        bound: 'local' for each site alone, 'pooled' for all data in one place; neither is federated.
        adapts: whether the document's adaptation follows.
        run: the method whose runs it looks at, if not its own: what that one shares before it adapts.
    """

    title: str
    lines: Lines = field(default_factory=dict)
    source: str = ""
    bound: str = ""
    adapts: bool = False
    run: str = ""


def _local(*patterns: str) -> Lines:
    return {"parameters": {"local": list(patterns)}}


SGD = {"type": "sgd", "lr": 0.05, "weight_decay": 0.0}

METHODS: dict[str, Method] = {
    REFERENCE: Method("FedAvg + adaptation", adapts=True),
    "fedavg": Method("FedAvg", source="McMahan et al. 2017", run=REFERENCE),
    "fedprox": Method("FedProx", {"stages": {"proximal": 0.01}}, "Li et al. 2020"),
    "fedadam": Method("FedAdam", {"aggregation": {"strategy": "fedadam"}}, "Reddi et al. 2021"),
    "fedyogi": Method("FedYogi", {"aggregation": {"strategy": "fedyogi"}}, "Reddi et al. 2021"),
    "scaffold": Method(
        "SCAFFOLD", {"aggregation": {"strategy": "scaffold"}, "stages": {"optimizer": SGD}}, "Karimireddy et al. 2020"
    ),
    "fedbn": Method("FedBN", _local("*norm*"), "Li et al. 2021"),
    "fedper": Method("FedPer", _local("heads.*"), "Arivazhagan et al. 2019"),
    "fedrep": Method("FedRep", {**_local("heads.*"), "stages": {"local_first": "half"}}, "Collins et al. 2021"),
    "local-fusion": Method("local fusion", _local("fusion.*"), "MFedMC, Yuan et al. 2024"),
    "local-fusion-head": Method("local fusion and head", _local("fusion.*", "heads.*")),
    "ditto": Method("Ditto", {"stages": {"personal": 0.1}}, "Li et al. 2021"),
    "dual-lora": Method(
        "dual LoRA",
        {
            "model": {"adapters": {"common": {"targets": ["encoders.*"]}, "own": {"targets": ["encoders.*"]}}},
            "parameters": {"local": ["*.lora_*.own.*"], "shared": ["*.lora_*.common.*", "*"]},
        },
        "Med-DualLoRA, 2024",
    ),
    "full-model": Method("whole-model averaging", {"aggregation": {"weight": "studies"}}),
    "local-only": Method("each site alone", bound="local"),
    "pooled": Method("all data in one place", bound="pooled"),
}


def apply(name: str, federation: Federation, sites: int) -> Federation:
    """A document as a method would have it; what the document itself says of methods is taken out first.

    Raises:
        MmfmError: there is no such method, or it does not fit the document.
    """
    method = METHODS[name]
    content = federation.model_dump(mode="json")
    plain = {"proximal": 0.0, "personal": 0.0, "local_first": 0}
    adaptation = [stage for stage in content["stages"] if not stage["federated"]]
    content["stages"] = [stage | plain for stage in content["stages"] if stage["federated"]]
    content["parameters"]["local"] = []
    content["aggregation"] |= {"strategy": "fedavg", "weight": "studies_with_modality"}
    for entry, lines in method.lines.items():
        if entry == "stages":
            content["stages"] = [stage | _for_stage(lines, stage) for stage in content["stages"]]
        else:
            content[entry] |= lines
    if method.adapts:
        content["stages"] += adaptation or [_adaptation(content["stages"][-1])]
    try:
        changed = Federation.model_validate(content)
    except ValueError as error:
        raise MmfmError(f"'{name}' does not fit this document ({error}); leave it out of --methods") from error
    bounds: Mapping[str, Callable[[], Federation]] = {
        "local": lambda: baselines.local_only(changed),
        "pooled": lambda: baselines.pooled(changed, sites),
    }
    return bounds[method.bound]() if method.bound else changed


def _for_stage(lines: Lines, stage: dict[str, Any]) -> dict[str, Any]:
    half = stage["local_steps"] // 2
    return {key: half if value == "half" else value for key, value in lines.items()}


def _adaptation(last: dict[str, Any]) -> dict[str, Any]:
    """Of a document that has none: fusion and heads, for as long as a few rounds."""
    stage = Stage(name="adapt", federated=False, local_steps=5 * last["local_steps"], tasks=last["tasks"])
    kept = {key: last[key] for key in ("batch_size", "optimizer")}
    return stage.model_dump(mode="json") | kept | {"train": ["fusion.*", "heads.*"]}
