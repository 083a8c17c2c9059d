"""Who is here: sites join, leave and come back between rounds."""

import time

from flwr.serverapp import Grid

from mmfm_core.config import Federation
from mmfm_core.config.loading import sha256
from mmfm_core.errors import MmfmError
from mmfm_core.protocol import Describe, Refusal, SiteDescription, to_records
from server.exchange import POLL_SECONDS, Answer, ask
from server.record import Run
from server.sites import check_description


class Attendance:
    """The sites that are connected and usable, by node; what a node holds is asked once."""

    def __init__(self, grid: Grid, run: Run, federation: Federation) -> None:
        self._grid, self._run, self._federation = grid, run, federation
        self._question = to_records(Describe(sha256(federation)))
        self._expected: int = run.facts.get("expected_sites", 0)
        self._refused: set[int] = set()
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
        for node in self.sites.keys() - present:  # who comes back may be another node
            self._run.tell("is not connected any more", level="warning", site=self.sites.pop(node).site)
        new = sorted(present - self.sites.keys() - self._refused)
        for answer in ask(self._grid, new, lambda _: self._question, "query", self._federation.aggregation.deadline):
            try:
                self._admit(answer)
            except MmfmError as error:
                self._refused.add(answer.node)
                named = answer.message.site if answer.message else ""
                self._run.tell(f"is left out: {error}", level="warning", site=named or f"node {answer.node}")
        if new:
            met = {site.site: _facts(site) for site in self.sites.values()}
            self._run.update(sites=self._run.facts.get("sites", {}) | met)

    def _admit(self, answer: Answer) -> None:
        site = answer.message
        if not isinstance(site, SiteDescription):
            raise MmfmError(problem_of(answer))
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


def _facts(site: SiteDescription) -> dict[str, object]:
    told = ("min_count", "studies", "patients", "modalities", "targets")
    return {name: getattr(site, name) for name in told}
