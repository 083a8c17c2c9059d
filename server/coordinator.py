"""The coordinator's work: from a run directory and a Flower grid to the last round."""

import time
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from flwr.app import RecordDict
from flwr.serverapp import Grid

from mmfm_core.compression import narrowed
from mmfm_core.config.federation import Federation
from mmfm_core.config.loading import sha256
from mmfm_core.config.rounds import Round, rounds_of
from mmfm_core.data.dataset import NO_ARTIFACTS
from mmfm_core.errors import MmfmError
from mmfm_core.models.model import full_model
from mmfm_core.models.parameters import blocks_of, check_patterns, fates_of, held
from mmfm_core.protocol import Pack, RoundReply, RoundRequest, SiteDescription, to_records
from mmfm_core.storage import Tensors
from server.attendance import Attendance, problem_of
from server.exchange import Answer, ask
from server.patience import Patience
from server.record import Run
from server.sites import FEDERATION, check_figures, check_sites, one_class_sites
from server.strategy import Strategy

ATTEMPTS = 3  # a round that came to nothing is asked again before the run gives up


def coordinate(grid: Grid, run: Run, pack: Pack = to_records) -> None:
    """Run the run's federation from its last checkpoint to its end; every outcome is written to the run directory.

    Args:
        pack: makes the records of a round's questions.

    Raises:
        MmfmError: the run cannot go on; it can be resumed once the cause is gone.
    """
    with run.locked():
        try:
            with run.room_kept():
                Coordinator(grid, run, pack).work()
        except MmfmError as error:
            run.update(status="failed", cause=str(error), finished=time.time())
            raise


class Coordinator:
    """One run at work."""

    def __init__(self, grid: Grid, run: Run, pack: Pack) -> None:
        self.grid, self.run, self.pack = grid, run, pack
        self.federation: Federation = run.federation
        self.document = sha256(self.federation)
        self.attendance = Attendance(grid, run, self.federation)
        self.patience = Patience(self.federation.aggregation.deadline)

    def work(self) -> None:
        """All rounds that are left."""
        rounds = rounds_of(self.federation)
        initial = initial_state(self.federation, self.run.directory / "artifacts")
        first = {name: initial[name] for name in held(fates_of(self.federation, initial), "shared")}
        done, shared = self.run.checkpoint() or (0, first)
        self.run.forget_after(done)
        blocks = [asdict(block) for block in blocks_of(self.federation, initial)]
        self.run.update(status="running", cause=None, rounds=len(rounds), blocks=blocks)
        needed = max((self._needed(this) for this in rounds[done:]), default=1)
        self.attendance.gather(needed, max(needed, self.run.facts.get("expected_sites", 0)))
        sites = self.attendance.sites.values()
        check_sites(self.federation, sites)
        for site, sentence in one_class_sites(self.federation, sites):
            self.run.tell(sentence, level="warning", site=site)
        strategy = Strategy(self.federation, shared, self.run.memory())
        for this in rounds[done:]:
            if not this.returns_tensors:
                strategy.conclude()
            self._round(strategy, this)
            self.run.save_checkpoint(this.number, strategy.shared, strategy.memory)
            self.run.update(round=this.number, round_ended=time.time())
        self.run.update(status="completed", finished=time.time())

    def _needed(self, this: Round) -> int:
        return self.federation.aggregation.min_sites if this.returns_tensors else 1

    def _round(self, strategy: Strategy, this: Round) -> None:
        needed = self._needed(this)
        for attempt in range(1, ATTEMPTS + 1):
            for site in self.attendance.gather(needed, needed):
                self.run.tell(f"takes part from round {this.number} on", site=site, round=this.number)
            if self._attempt(strategy, this, attempt) >= needed:
                strategy.advance(self.attendance.sites.values())
                return
            strategy.void()
            self.run.update(void_rounds=self.run.facts.get("void_rounds", 0) + 1)
            self.run.forget_after(this.number - 1)
            self.run.tell(
                f"round {this.number} is void: fewer than {needed} usable replies (attempt {attempt} of {ATTEMPTS})",
                level="warning",
                round=this.number,
            )
        raise MmfmError(
            f"round {this.number} came to nothing {ATTEMPTS} times: fewer than {needed} sites gave a usable "
            f"reply; {self.run.events} has each site's reason; mend that, then resume"
        )

    def _attempt(self, strategy: Strategy, this: Round, attempt: int) -> int:
        """Ask once, fold what comes, and return the number of usable replies."""
        started = time.monotonic()
        asked = strategy.drawn(self.attendance.sites, this, attempt)
        state = strategy.state_for(this)
        if self.federation.aggregation.wire.state == "fp16":
            state = narrowed(state)
        names = {node: tuple(strategy.tensors_for(site, this)) for node, site in asked.items()}

        @lru_cache(maxsize=1)  # sites that hold the same are sent the same; one question at a time is in memory
        def question(names: tuple[str, ...]) -> RecordDict:
            return self.pack(RoundRequest(self.document, this.number, {name: state[name] for name in names}))

        usable = bytes_up = 0
        for answer in ask(
            self.grid,
            asked,
            lambda node: question(names[node]),
            "train",
            self.patience.seconds,
        ):
            site = asked[answer.node]
            if answer.message is None:
                self.patience.silent(answer.node)
            else:
                self.patience.answered(answer.node, time.monotonic() - started)
            try:
                reply = self._take(strategy, answer, site, this)
            except MmfmError as error:
                self.run.tell(f"is left out: {error}", level="warning", site=site.site, round=this.number)
                continue
            usable += 1
            bytes_up += sum(tensor.nbytes for tensor in reply.tensors.values())
            self._record(reply, site, this)
        bytes_down = sum(state[name].nbytes for sent in names.values() for name in sent)
        for metric, value in {
            "sites": usable,
            "bytes_down": bytes_down,
            "bytes_up": bytes_up,
            "seconds": time.monotonic() - started,
        }.items():
            self.run.record(round=this.number, stage=this.name, site=FEDERATION, metric=metric, value=value)
        return usable

    def _take(self, strategy: Strategy, answer: Answer, site: SiteDescription, this: Round) -> RoundReply:
        if not isinstance(answer.message, RoundReply):
            raise MmfmError(problem_of(answer))
        check_figures(answer.message, self.federation)
        strategy.fold(answer.message, site, this)
        return answer.message

    def _record(self, reply: RoundReply, site: SiteDescription, this: Round) -> None:
        line = {"round": this.number, "stage": this.name, "site": site.site}
        self.run.record(**line, metric="seconds", value=reply.seconds)
        if reply.loss is not None:
            self.run.record(**line, split="train", metric="loss", value=reply.loss)
        if reply.epsilon is not None:
            self.run.record(**line, metric="epsilon", value=reply.epsilon)
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
                **({"modalities": m.modalities} if m.modalities else {}),
            )


def initial_state(federation: Federation, artifacts: Path = NO_ARTIFACTS) -> Tensors:
    """The full model's state from the document's seed, and the pinned files it starts from.

    Raises:
        MmfmError: the parameter policy does not fit the model's names.
    """
    model = full_model(federation.model, federation.seed, artifacts)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    check_patterns(federation, state)
    return state
