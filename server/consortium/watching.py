"""What a coordinator's state is: for `mmfm coordinator status` and for the monitor."""

import time
from dataclasses import dataclass

from mmfm_core.config.rounds import rounds_of
from mmfm_core.errors import MmfmError
from server.consortium.certificates import describe
from server.consortium.enrolling import registry_of
from server.consortium.link import connect
from server.consortium.running import ENDED, settle_all
from server.consortium.settings import Consortium
from server.record import Run


@dataclass(frozen=True)
class SiteState:
    """One enrolled site.

    Attributes:
        last_seen: seconds since 1970, None if never.
    """

    name: str
    status: str
    last_seen: float | None


@dataclass(frozen=True)
class RunState:
    """One run.

    Attributes:
        round: the last round that is done.
        round_ended: when it ended, or when the run started; seconds since 1970.
        void: rounds that came to nothing and were asked again.
    """

    name: str
    directory: str
    status: str
    cause: str | None
    round: int
    rounds: int
    round_ended: float
    void: int

    @property
    def active(self) -> bool:
        """Whether it goes on."""
        return self.status not in ENDED


@dataclass(frozen=True)
class State:
    """All of it, at one moment.

    Attributes:
        problem: why the link does not answer, or None.
    """

    problem: str | None
    sites: list[SiteState]
    runs: list[RunState]
    certificate_days: float


def look(consortium: Consortium) -> State:
    """Ask the link, and settle runs that died."""
    days = describe(consortium.certificate).days_left
    enrolled = registry_of(consortium).active()
    try:
        with connect(consortium) as link:
            nodes, runs = link.nodes(), settle_all(consortium, link)
    except MmfmError as error:
        sites = [SiteState(site, "unknown", None) for site in sorted(enrolled)]
        runs = [run for run in map(Run, sorted(consortium.runs.glob("*"))) if run.exists]
        return State(str(error), sites, [_state(run) for run in runs], days)
    sites = []
    for site, registration in sorted(enrolled.items()):
        node = nodes.get(registration.node)
        # Without a node: the database is older than the registry.
        sites.append(SiteState(site, node.status if node else "unknown to the link", node.last_seen if node else None))
    return State(None, sites, [_state(run) for run in runs], days)


def _state(run: Run) -> RunState:
    facts = run.facts
    rounds = len(rounds_of(run.federation)) if (run.directory / "federation.yaml").is_file() else 0
    return RunState(
        facts["name"],
        str(run.directory),
        facts["status"],
        facts.get("cause"),
        facts.get("round", 0),
        rounds,
        facts.get("round_ended") or facts.get("started") or time.time(),
        facts.get("void_rounds", 0),
    )
