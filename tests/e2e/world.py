"""What scenarios share: a coordinator and four sites that run, and what a run's directory says of it."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from e2e.network import Network
from hospital import Coordinator, Hospital, facts, wait
from tiny import MODALITIES, prepare_run, tiny_federation

from mmfm_core.config import Federation, Site
from mmfm_core.storage import read_tensors
from server.engines import in_process
from server.record import read_lines

SITES = {"north": MODALITIES, "south": ("note", "labs"), "east": ("scan", "note"), "west": ("scan", "labs")}
AGENT = "site run --agent-only"
PACE = float(os.environ.get("MMFM_E2E_PACE", "1"))
"""How many times slower this machine is than two idle cores: a round must end well before its deadline there."""

LONG = 1800.0 * PACE
DEADLINE = 60.0 * PACE


@dataclass
class World:
    """All that is running."""

    folder: Path
    network: Network
    coordinator: Coordinator
    hospitals: list[Hospital]
    sites: dict[str, Site]
    began: float = field(default_factory=time.monotonic)

    def run(self, name: str, rounds: int = 4, **aggregation: Any) -> Path:
        """Begin a run that every site approved; `seed` makes its document another than that of every other scenario."""
        return self.begin(document(name, rounds, **aggregation))

    def begin(self, federation: Federation) -> Path:
        """Begin a run of a document that every site approved; it is called what the document is."""
        for hospital in self.hospitals:
            hospital.approve(federation)
        return self.coordinator.start_run(federation, federation.name)

    def round_reached(self, run: Path, number: int) -> bool:
        """Whether a round is done."""
        return facts(run).get("round", 0) >= number

    def ended(self, run: Path, seconds: float = LONG) -> dict[str, Any]:
        """How it ended."""
        wait(lambda: facts(run)["status"] in ("completed", "failed", "interrupted"), seconds, f"{run.name} goes on")
        return facts(run)

    def completed(self, run: Path, seconds: float = LONG) -> None:
        """It must complete."""
        end = self.ended(run, seconds)
        assert end["status"] == "completed", end

    def everyone_is_online(self) -> None:
        """Every hospital's node is connected, within Flower's own time to notice."""
        wait(lambda: self.coordinator.mmfm("status", check=False).count(" online ") == len(self.hospitals), 240)

    def equals_simulation(self, run: Path, name: str, rounds: int = 4) -> None:
        """The shared parameters are those of an undisturbed run of the same document in one process."""
        reference = prepare_run(self.folder / "references" / name, document(name, rounds), self.sites)
        in_process.simulate(reference)
        (got, expected) = (
            read_tensors(max(each.glob("checkpoints/round-*/shared.safetensors"))) for each in (run, reference)
        )
        assert got.keys() == expected.keys()
        for tensor, value in got.items():
            np.testing.assert_allclose(value, expected[tensor], rtol=0, atol=1e-5, err_msg=tensor)


def document(name: str, rounds: int, **aggregation: Any) -> Federation:
    """A tiny federation for a scenario."""
    federation = tiny_federation(
        name=name,
        seed=sum(name.encode()),
        aggregation={"min_sites": 2, "quorum_wait": 120, "deadline": DEADLINE} | aggregation,
    )
    (stage,) = [stage for stage in federation.stages if stage.federated]
    return federation.model_copy(update={"stages": (stage.model_copy(update={"rounds": rounds}),)})


def sites_of_round(run: Path) -> dict[int, set[str]]:
    """Which sites' replies count in each round; a site that counted twice is an error."""
    counted: dict[int, list[str]] = {}
    for line in read_lines(run / "metrics.jsonl"):
        if line["metric"] == "seconds" and line["site"] != "federation":
            counted.setdefault(line["round"], []).append(line["site"])
    for number, names in counted.items():
        assert len(names) == len(set(names)), f"round {number} counted {names}"
    return {number: set(names) for number, names in counted.items()}


def events(run: Path, site: str) -> list[str]:
    """What was told about a site."""
    return [line["text"] for line in read_lines(run / "events.jsonl") if line.get("site") == site]


def seconds_of_rounds(run: Path) -> list[float]:
    """How long each round took."""
    lines = read_lines(run / "metrics.jsonl")
    return [line["value"] for line in lines if line["site"] == "federation" and line["metric"] == "seconds"]
