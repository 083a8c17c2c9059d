"""What happened round by round, and who holds what, from the run directory's lines and facts."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmfm_core.config import Federation
from mmfm_core.config.site import SPLITS, Split
from server.report.results import Line

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Curves:
    """One site's training: loss by stage, and by task the shared model's leading metric on its validation split."""

    site: str
    loss: dict[str, Points] = field(default_factory=dict)
    validation: dict[str, Points] = field(default_factory=dict)


@dataclass(frozen=True)
class Traffic:
    """What one round, or several together, moved between the coordinator and all its sites."""

    label: str
    rounds: int
    sites: int
    down: int
    up: int


@dataclass(frozen=True)
class Holding:
    """What one site holds.

    Attributes:
        modalities: the share of its studies with each modality; None where it is not held.
        splits: the studies and patients of each split.
    """

    site: str
    modalities: dict[str, float | None]
    splits: dict[Split, tuple[int, int]]


def done_rounds(lines: Iterable[Line]) -> set[int]:
    """The rounds that came to their end: the coordinator's own lines are the last of a round."""
    return {line["round"] for line in lines if line["site"] == "federation"}


def curves_of(federation: Federation, lines: Sequence[Line]) -> list[Curves]:
    """The curves of every site that trained or was measured, in the order of their first line."""
    curves: dict[str, Curves] = {}
    for line in lines:
        value = line.get("value")
        if line["site"] == "federation" or value is None or not math.isfinite(value):
            continue
        point = line["round"], float(value)
        task = line.get("task")
        if line["metric"] == "loss":
            curves.setdefault(line["site"], Curves(line["site"])).loss.setdefault(line["stage"], []).append(point)
        elif (
            line.get("split") == "val"
            and not line.get("modalities")
            and line.get("model") == "shared"
            and task in federation.model.heads
            and line["metric"] == federation.metrics_of(task)[0]
        ):
            curves.setdefault(line["site"], Curves(line["site"])).validation.setdefault(task, []).append(point)
    return list(curves.values())


def traffic_of(lines: Iterable[Line]) -> tuple[list[Traffic], list[Traffic]]:
    """Bytes by stage, and by round."""
    told: dict[tuple[int, str], dict[str, float]] = {}
    for line in lines:
        if line["site"] == "federation":
            told.setdefault((line["round"], line["stage"]), {})[line["metric"]] = line["value"] or 0
    by_round, by_stage = [], dict[str, Traffic]()
    for (number, stage), figures in told.items():
        sites, down, up = (int(figures.get(metric, 0)) for metric in ("sites", "bytes_down", "bytes_up"))
        by_round.append(Traffic(f"{number} ({stage})", 1, sites, down, up))
        by_stage[stage] = total([by_stage[stage], by_round[-1]] if stage in by_stage else [by_round[-1]], stage)
    return list(by_stage.values()), by_round


def total(parts: Sequence[Traffic], label: str = "All") -> Traffic:
    """Several taken together."""
    return Traffic(
        label,
        sum(t.rounds for t in parts),
        max((t.sites for t in parts), default=0),
        sum(t.down for t in parts),
        sum(t.up for t in parts),
    )


def holdings_of(federation: Federation, sites: Mapping[str, Any]) -> list[Holding]:
    """Who holds what, over all splits."""
    holdings = []
    for name, facts in sites.items():
        studies = sum(facts["studies"].values())
        held = {modality: sum(count.values()) for modality, count in facts["modalities"].items()}
        shares = {
            m: min(held[m] / studies, 1.0) if m in held and studies else None  # both may be rounded
            for m in federation.model.modalities
        }
        splits = {split: (facts["studies"].get(split, 0), facts["patients"].get(split, 0)) for split in SPLITS}
        holdings.append(Holding(name, shares, splits))
    return holdings


def balance_of(federation: Federation, sites: Mapping[str, Any]) -> dict[str, dict[str, dict[str, int]]]:
    """Head -> site -> label -> labelled studies over all splits."""
    balance: dict[str, dict[str, dict[str, int]]] = {}
    for head, spec in federation.model.heads.items():
        by_site = balance.setdefault(head, {})
        for site, facts in sites.items():
            splits = facts["targets"].get(head, {}).values()
            by_site[site] = {name: sum(split.get(name, 0) for split in splits) for name in spec.labels}
    return balance


def holders_of(block: str, federation: Federation, sites: Mapping[str, Any]) -> list[str]:
    """The sites that build a block of the model, by what they hold."""
    held = federation.model.held
    return [site for site, facts in sites.items() if block in held(facts["modalities"], facts["targets"]).blocks]


def shared_bytes(
    blocks: Iterable[Mapping[str, Any]], federation: Federation, sites: Mapping[str, Any]
) -> dict[str, int]:
    """Site -> bytes of the shared blocks it holds: the most that leaves it in one round."""
    held = dict.fromkeys(sites, 0)
    for block in blocks:
        for site in holders_of(block["block"], federation, sites) if block["fate"] == "shared" else ():
            held[site] += block["bytes"]
    return held


def paid_by(lines: Iterable[Line]) -> dict[str, float]:
    """Site -> the epsilon that the run's rounds have cost each of its patients, as its ledger told last."""
    return {line["site"]: float(line["value"]) for line in lines if line["metric"] == "epsilon"}
