"""The coordinator's work: from a run directory and a Flower grid to the last round."""

import time
from collections.abc import Iterable
from dataclasses import asdict

from flwr.serverapp import Grid

from mmfm_core.config.federation import Federation
from mmfm_core.config.loading import sha256
from mmfm_core.config.rounds import Round, rounds_of
from mmfm_core.errors import MmfmError
from mmfm_core.models.model import full_model
from mmfm_core.models.parameters import blocks_of, check_patterns, fates_of, held
from mmfm_core.protocol import Describe, Refusal, RoundReply, RoundRequest, SiteDescription, to_arrays, to_records
from mmfm_core.storage import Tensors
from server.exchange import POLL_SECONDS, Answer, ask
from server.record import Run
from server.strategy import Strategy

ATTEMPTS = 3  # a round that came to nothing is asked again before the run gives up


def coordinate(grid: Grid, run: Run) -> None:
    """Run the run's federation from its last checkpoint to its end; every outcome is written to the run directory.

    Raises:
        MmfmError: the run cannot go on; it can be resumed once the cause is gone.
    """
    with run.locked():
        try:
            Coordinator(grid, run).work()
        except MmfmError as error:
            run.update(status="failed", cause=str(error), finished=time.time())
            raise


class Coordinator:
    """One run at work. Sites may join between rounds; what each one holds is asked once."""

    def __init__(self, grid: Grid, run: Run) -> None:
        self.grid, self.run = grid, run
        self.federation: Federation = run.federation
        self.document = sha256(self.federation)
        self.sites: dict[int, SiteDescription] = {}
        self._refused: set[int] = set()

    def work(self) -> None:
        """All rounds that are left."""
        rounds = rounds_of(self.federation)
        initial = initial_state(self.federation)
        first = {name: initial[name] for name in held(fates_of(self.federation, initial), "shared")}
        done, shared = self.run.checkpoint() or (0, first)
        self.run.forget_after(done)
        blocks = [asdict(block) for block in blocks_of(self.federation, initial)]
        self.run.update(status="running", cause=None, rounds=len(rounds), blocks=blocks)
        self._meet_sites()
        check_sites(self.federation, self.sites.values())
        self.run.update(sites={site.site: _facts(site) for site in self.sites.values()})
        strategy = Strategy(self.federation, shared)
        for this in rounds[done:]:
            self._round(strategy, this)
            self.run.save_checkpoint(this.number, strategy.shared)
        self.run.update(status="completed", finished=time.time())

    def _meet_sites(self) -> None:
        """Wait, a bounded time, for the sites this run expects; go on with at least `min_sites` of them."""
        policy, expected = self.federation.aggregation, self.run.facts.get("expected_sites", 0)
        wanted = max(expected, policy.min_sites)
        end = time.monotonic() + policy.quorum_wait
        while True:
            self._describe_new_nodes()
            if len(self.sites) + len(self._refused) >= wanted:
                break
            if time.monotonic() > end:
                break
            time.sleep(POLL_SECONDS)
        if len(self.sites) < policy.min_sites:
            raise MmfmError(
                f"{len(self.sites)} sites are ready and aggregation.min_sites is {policy.min_sites}; "
                "see events.jsonl for who refused and why, then resume"
            )

    def _describe_new_nodes(self) -> None:
        new = [node for node in self.grid.get_node_ids() if node not in self.sites and node not in self._refused]
        question = to_records(Describe(self.document))
        for answer in ask(self.grid, new, lambda _: question, "query", self.federation.aggregation.deadline):
            if not isinstance(answer.message, SiteDescription):
                self._refused.add(answer.node)
                self._tell_problem(answer, None)
            elif answer.message.site in {site.site for site in self.sites.values()}:
                self._refused.add(answer.node)
                self.run.tell(f"a second node calls itself '{answer.message.site}' and is left out", level="warning")
            else:
                self.sites[answer.node] = answer.message
                for note in answer.message.notes:
                    self.run.tell(note, site=answer.message.site)

    def _round(self, strategy: Strategy, this: Round) -> None:
        needed = self.federation.aggregation.min_sites if this.returns_tensors else 1
        for attempt in range(1, ATTEMPTS + 1):
            if attempt > 1 or this.number > 1:
                self._describe_new_nodes()
            if self._attempt(strategy, this) >= needed:
                strategy.advance()
                return
            strategy.void()
            self.run.forget_after(this.number - 1)
            self.run.tell(
                f"round {this.number} is void: fewer than {needed} usable replies (attempt {attempt} of {ATTEMPTS})",
                level="warning",
                round=this.number,
            )
        raise MmfmError(
            f"round {this.number} came to nothing {ATTEMPTS} times: fewer than {needed} sites gave a usable "
            "reply; see events.jsonl for each site's reason, then resume"
        )

    def _attempt(self, strategy: Strategy, this: Round) -> int:
        """Ask once, fold what comes, and return the number of usable replies."""
        started = time.monotonic()
        asked = {node: site for node, site in self.sites.items() if strategy.takes_part(site, this)}
        arrays = to_arrays(strategy.shared)
        names = {node: strategy.tensors_for(site) for node, site in asked.items()}
        request = RoundRequest(self.document, this.number)
        usable = bytes_up = 0
        for answer in ask(
            self.grid,
            asked,
            lambda node: to_records(request, {name: arrays[name] for name in names[node]}),
            "train",
            self.federation.aggregation.deadline,
        ):
            site = asked[answer.node]
            if not isinstance(answer.message, RoundReply):
                self._tell_problem(answer, this)
                continue
            try:
                strategy.fold(answer.message, site, this)
            except MmfmError as error:
                self.run.tell(f"its reply was left out: {error}", level="warning", site=site.site, round=this.number)
                continue
            usable += 1
            bytes_up += sum(tensor.nbytes for tensor in answer.message.tensors.values())
            self._record(answer.message, site, this)
        bytes_down = sum(strategy.shared[name].nbytes for sent in names.values() for name in sent)
        for metric, value in {
            "sites": usable,
            "bytes_down": bytes_down,
            "bytes_up": bytes_up,
            "seconds": time.monotonic() - started,
        }.items():
            self.run.record(round=this.number, stage=this.name, site="federation", metric=metric, value=value)
        return usable

    def _record(self, reply: RoundReply, site: SiteDescription, this: Round) -> None:
        line = {"round": this.number, "stage": this.name, "site": site.site}
        self.run.record(**line, metric="seconds", value=reply.seconds)
        if reply.loss is not None:
            self.run.record(**line, split="train", metric="loss", value=reply.loss)
        for m in reply.metrics:
            self.run.record(
                **line,
                task=m.task,
                model=m.model,
                split=m.split,
                metric=m.metric,
                value=m.value,
                n=m.n,
                low=m.low,
                high=m.high,
            )

    def _tell_problem(self, answer: Answer, this: Round | None) -> None:
        known = self.sites.get(answer.node)
        if isinstance(answer.message, Refusal):
            name, text = answer.message.site or "a node", f"refused: {answer.message.reason}"
        else:
            name, text = "a node", answer.problem or "sent an answer of another kind"
        self.run.tell(text, level="warning", site=known.site if known else name, round=this.number if this else None)


def initial_state(federation: Federation) -> Tensors:
    """The full model's state from the document's seed.

    Raises:
        MmfmError: the parameter policy does not fit the model's names.
    """
    state = {
        name: tensor.numpy() for name, tensor in full_model(federation.model, federation.seed).state_dict().items()
    }
    check_patterns(federation, state)
    return state


def check_sites(federation: Federation, sites: Iterable[SiteDescription]) -> None:
    """Check that the sites together can do what the document says.

    Raises:
        MmfmError: a modality that no site holds, or a trained head that no site has a training label for.
    """
    sites = list(sites)
    for name in federation.model.modalities:
        if not any(name in site.modalities for site in sites):
            raise MmfmError(f"model.modalities.{name}: no site holds it; map it in a site's file, or take it out")
    for index, stage in enumerate(federation.stages):
        for head in stage.tasks:
            if not any(sum(site.targets.get(head, {}).get("train", {}).values()) for site in sites):
                raise MmfmError(
                    f"stages.{index}.tasks.{head}: no site has a training label for it; map a column under "
                    "'targets' in a site's file"
                )


def _facts(site: SiteDescription) -> dict[str, object]:
    return {"studies": site.studies, "patients": site.patients, "modalities": site.modalities, "targets": site.targets}
