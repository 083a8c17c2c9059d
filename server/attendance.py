"""Who is here: sites join, leave and come back between rounds."""

import time
from pathlib import Path

from flwr.serverapp import Grid

from mmfm_core.config import Federation
from mmfm_core.config.loading import sha256
from mmfm_core.errors import MmfmError
from mmfm_core.protocol import Describe, Refusal, SiteDescription, to_records
from server.exchange import POLL_SECONDS, Answer, ask
from server.record import Run
from server.registry import Registry
from server.sites import check_description

ASK_AGAIN_SECONDS = 300.0  # a site that refused may have approved the document since


class Attendance:
    """The sites that are connected and usable, by node; what a node holds is asked once.

    Among real hospitals only those are asked that the coordinator enrolled, and each counts by the name that its key
    was enrolled under. In a simulation there is no registry, and every node counts by the name that it gives.
    """

    def __init__(self, grid: Grid, run: Run, federation: Federation) -> None:
        self._grid, self._run, self._federation = grid, run, federation
        self._question = to_records(Describe(sha256(federation)))
        self._expected: int = run.facts.get("expected_sites", 0)
        self._registry = Registry(Path(run.facts["registry"])) if "registry" in run.facts else None
        self._refused: dict[int, float] = {}
        self.sites: dict[int, SiteDescription] = {}

    def gather(self, needed: int, wanted: int) -> list[str]:
        """Meet who is here now; while they are fewer than `wanted`, wait for more, but a bounded time.

        Returns:
            The sites that were not here before.

        Raises:
            MmfmError: fewer than `needed` are here.
        """
        before = set(self.sites)
        end = time.monotonic() + self._federation.aggregation.quorum_wait
        self._meet()
        while len(self.sites) < wanted and not self._everyone_answered() and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
            self._meet()
        if len(self.sites) < needed:
            raise MmfmError(
                f"{len(self.sites)} sites are ready and aggregation.min_sites is {needed}; "
                f"{self._run.events} says who refused and why; mend that, then resume"
            )
        return [site.site for node, site in self.sites.items() if node not in before]

    def _everyone_answered(self) -> bool:
        return 0 < self._expected <= len(self.sites) + len(self._refused)

    def _meet(self) -> None:
        present = set(self._grid.get_node_ids())
        enrolled = None if self._registry is None else self._registry.sites()
        for node in sorted(self.sites.keys() - present):  # who comes back may be another node
            self._run.tell("is not connected any more", level="warning", site=self.sites.pop(node).site)
        if enrolled is not None:
            for node in sorted(self.sites.keys() - enrolled.keys()):
                self._run.tell("is not enrolled any more", level="warning", site=self.sites.pop(node).site)
            present &= enrolled.keys()
        self._refused = {node: since for node, since in self._refused.items() if _is_recent(since)}
        new = sorted(present - self.sites.keys() - self._refused.keys())
        for answer in ask(self._grid, new, lambda _: self._question, "query", self._federation.aggregation.deadline):
            named = enrolled[answer.node] if enrolled is not None else ""
            try:
                self._admit(answer, named)
            except MmfmError as error:
                self._refused[answer.node] = time.monotonic()
                named = named or (answer.message.site if answer.message else "")
                self._run.tell(f"is left out: {error}", level="warning", site=named or f"node {answer.node}")
        if new:
            met = {site.site: _facts(site) for site in self.sites.values()}
            self._run.update(sites=self._run.facts.get("sites", {}) | met)

    def _admit(self, answer: Answer, enrolled_as: str) -> None:
        site = answer.message
        if not isinstance(site, SiteDescription):
            raise MmfmError(problem_of(answer))
        if enrolled_as and site.site != enrolled_as:
            raise MmfmError(f"it calls itself '{site.site}'; 'name' in its site.yaml must be what it is enrolled as")
        check_description(site, self._federation)
        if site.site in {other.site for other in self.sites.values()}:
            raise MmfmError("another node with the same site name is here already")
        self.sites[answer.node] = site
        for note in site.notes:
            self._run.tell(str(note), site=site.site)


def problem_of(answer: Answer) -> str:
    """Why an answer is none, as a sentence about the site."""
    if isinstance(answer.message, Refusal):
        return f"it refused: {answer.message.reason}"
    return answer.problem or "it sent an answer of another kind"


def _is_recent(refused: float) -> bool:
    return time.monotonic() - refused < ASK_AGAIN_SECONDS


def _facts(site: SiteDescription) -> dict[str, object]:
    told = ("min_count", "studies", "patients", "modalities", "targets")
    return {name: getattr(site, name) for name in told}
