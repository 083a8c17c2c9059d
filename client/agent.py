"""The site agent: the only code that touches patients. It decides what it does and what leaves."""

import logging
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from client import gates
from client.adaptation import choose
from client.egress import EGRESS, EgressLog
from client.learning import PERSONAL, learn
from client.loading import arrays, initial, load
from client.predictions import write_predictions
from client.private import LEDGER, PrivateRounds, holder_of
from client.state import LocalState
from mmfm_core.compression import closed, narrowed, widened
from mmfm_core.config import Federation, load_site
from mmfm_core.config.federation import Fate, Stage
from mmfm_core.config.model import Model
from mmfm_core.config.rounds import Round, rounds_of
from mmfm_core.config.site import Budget, Device, Precision, Release, Split
from mmfm_core.data.cache import CACHE
from mmfm_core.data.dataset import Dataset, load_dataset
from mmfm_core.data.description import describe
from mmfm_core.data.features import with_features
from mmfm_core.errors import MmfmError
from mmfm_core.models.model import MultimodalModel, seeded
from mmfm_core.models.parameters import CONTROL, block_of, fates_of, held, matches
from mmfm_core.models.placement import placed
from mmfm_core.privacy.figures import noised_metrics
from mmfm_core.privacy.ledger import Ledger
from mmfm_core.privacy.step import patients_of, unpredictable
from mmfm_core.protocol import Describe, Metric, Refusal, RoundReply, RoundRequest, SiteDescription
from mmfm_core.storage import Tensors
from mmfm_core.training.evaluation import metrics_of, predict, subsets
from mmfm_core.training.steps import train

log = logging.getLogger(__name__)

Build = Callable[[Model, Collection[str], Collection[str], int, Path], MultimodalModel]
"""Of what a site holds of a document's model: see `MultimodalModel`."""


@dataclass(frozen=True)
class Participation:
    """One approved federation at this site, ready to work: document, data, model and what stays here."""

    document: str
    federation: Federation
    rounds: list[Round]
    dataset: Dataset
    model: MultimodalModel
    initial: Tensors
    fates: dict[str, Fate]
    state: LocalState
    private: PrivateRounds | None


class Agent:
    """A site's agent over its directory.

    The directory holds `site.yaml`, `approved/<sha256>.yaml` (the documents this site agreed to), and what the agent
    writes: `state/` (local parameters), `predictions/`, `cache/` (decoded images and features of frozen trunks) and
    `ledger.sqlite`, none of which is sent; `answers/` (the last replies to private rounds), and `egress.sqlite` (what
    was sent).

    Log and local state are on the disk before an answer leaves, unless the site is not `durable`, as in a simulation:
    then they outlive the process, however it ends, but maybe not a power cut.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        release: Release,
        read: Callable[[Model], Dataset],
        budget: Budget | None = None,
        ledger: Path | None = None,
        build: Build = MultimodalModel,
        durable: bool = True,
        device: Device = "cpu",
        precision: Precision = "float32",
    ) -> None:
        self.directory, self.name, self._release, self._read, self._build = directory, name, release, read, build
        self._budget, self._ledger = budget or Budget(), ledger or directory / LEDGER
        self.egress, self._durable = EgressLog(directory / EGRESS, durable), durable
        self._device, self._precision = device, precision
        self._participations: dict[str, Participation] = {}

    @classmethod
    def open(cls, directory: Path, durable: bool = True, build: Build = MultimodalModel) -> "Agent":
        """The agent of a site's directory."""
        site = load_site(directory / "site.yaml")
        read = partial(load_dataset, site, artifacts=directory / "artifacts", cache=directory / CACHE)
        return cls(
            directory,
            site.name,
            site.release,
            read,
            site.budget,
            site.ledger,
            build,
            durable,
            site.device,
            site.precision,
        )

    def answer(self, question: Describe | RoundRequest) -> SiteDescription | RoundReply | Refusal:
        """Answer, or refuse with a reason; never raise. The egress log has the answer before it is returned."""
        return self._let_out(self._decide(question), question)

    def refuse(self, reason: str) -> Refusal:
        """Refuse what could not be read as a question."""
        refusal = self._let_out(Refusal(self.name, gates.tellable(reason)), None)
        assert isinstance(refusal, Refusal)
        return refusal

    def _let_out(
        self, answer: SiteDescription | RoundReply | Refusal, question: Describe | RoundRequest | None
    ) -> SiteDescription | RoundReply | Refusal:
        try:
            self.egress.append(answer, question)
        except MmfmError as error:
            log.critical("nothing leaves: %s", error)
            return Refusal(self.name, "this site cannot write down what leaves, so nothing does; its own log says why")
        return answer

    def _decide(self, question: Describe | RoundRequest) -> SiteDescription | RoundReply | Refusal:
        # No value of a record, and no place on this machine, may get into a reason.
        try:
            participation = self.participate(question.federation)
            if isinstance(question, Describe):
                p = participation
                counted = describe(self.name, p.dataset.studies, p.federation.model, p.dataset.notes)
                return gates.described(counted, self._release)
            return self._take_part(participation, question)
        except MmfmError as error:
            log.warning("refused: %s", error)
            return Refusal(self.name, gates.tellable(error.told))
        except Exception as error:
            log.exception("site %s: internal error", self.name)
            reason = f"internal error ({type(error).__name__}); the site's own log has the details"
            return Refusal(self.name, reason)

    def participate(self, document: str) -> Participation:
        """Load (once) all that an approved document needs.

        Raises:
            MmfmError: the document is not approved here, or the site's data does not fit it.
        """
        federation = gates.approved(self.directory / "approved", document)  # every time: an approval can be withdrawn
        if document not in self._participations:
            dataset = self._read(federation.model)
            here = dataset.everything
            artifacts = self.directory / "artifacts"
            built = self._build(federation.model, here.inputs, here.targets, federation.seed, artifacts)
            model = placed(built, self._device)
            model.precision = getattr(torch, self._precision)
            fates = fates_of(federation, initial(model))
            self._participations[document] = Participation(
                document,
                federation,
                rounds_of(federation),
                with_features(dataset, model, federation.model, held(fates, "frozen"), self.directory / CACHE),
                model,
                initial(model),
                fates,
                LocalState(self.directory / "state" / document[:16], self._durable),
                self._private(federation, document),
            )
        return self._participations[document]

    def forget(self) -> None:
        """Give back the memory of data and models; the next question loads them anew."""
        self._participations.clear()

    def _private(self, federation: Federation, document: str) -> PrivateRounds | None:
        if not federation.privacy:
            return None
        answers = self.directory / "answers"
        ledger = Ledger(self._ledger, holder_of(answers))
        return PrivateRounds.of(federation, document, self._budget, ledger, answers / document[:16])

    def _take_part(self, p: Participation, request: RoundRequest) -> RoundReply:
        started = time.monotonic()
        if not 1 <= request.round <= len(p.rounds):
            raise MmfmError(f"the document has {len(p.rounds)} rounds, and round {request.round} was asked for")
        this = p.rounds[request.round - 1]
        shared = {name: p.initial[name] for name in held(p.fates, "shared")}
        wire, held_here = p.federation.aggregation.wire, shared | controls_of(p.federation, this, shared)
        gates.check_tensors(request.tensors, narrowed(held_here) if wire.state == "fp16" else held_here)
        received = widened(request.tensors, held_here)
        private = p.private if p.private and p.private.charge(this) else None
        if private and (known := private.answered(request)):
            return known
        if private and not this.returns_tensors:
            private.reserve(this)  # of figures; a round that fails is taken again for what was reserved
        kept = p.state.before(this.number)
        # What was adapted here comes last: after the last upload it stands over the shared state.
        tensors = {**p.initial, **received, **kept}
        before = {name: tensors[name] for name in p.initial}
        load(p.model, before)
        metrics = self._measure(p, "shared", self._told(p, this.evaluates))
        weights: dict[str, float] = {}
        leaving: Tensors = {}
        loss = None
        if this.stage is None:
            own = {name.removeprefix(PERSONAL): array for name, array in kept.items() if name.startswith(PERSONAL)}
            if own:
                load(p.model, before | own)
                metrics += self._measure(p, "adapted", self._told(p, ("val", "test")))
        elif this.stage.federated:
            trained = self._trained(p, this.stage)
            with self._randomness(p, this), private.paid(this) if private else nullcontext():
                mechanism = private.mechanism(self._patients(p, this.stage)) if private else None
                learned = learn(p.model, p.dataset, this.stage, trained, shared, received, kept, mechanism)
                leaving = gates.releasable(learned.after, [n for n in trained if n in shared])
                controls = gates.releasable(learned.controls, learned.controls)
            loss = learned.loss
            weights = block_weights(p.federation.model, p.dataset, this, leaving)
            leaving, lost = closed(before, leaving, kept, wire.update)
            leaving |= controls
            stays = {name: array for name, array in kept.items() if name not in p.initial} | learned.kept | lost
            p.state.save(this.number, {name: learned.after[name] for name in held(p.fates, "local")} | stays)
        else:
            trained = self._trained(p, this.stage)
            with self._randomness(p, this):
                loss = train(p.model, p.dataset, this.stage, trained)
                share, after = choose(p.model, p.dataset, this.stage, before, arrays(p.model))
            load(p.model, after)
            metrics += self._measure(p, "adapted", self._told(p, ("val", "test")))
            metrics += interpolations(p, this.stage, share)
            p.state.save(this.number, {name: after[name] for name in {*trained, *held(p.fates, "local")}})
        reply = RoundReply(
            site=self.name,
            round=this.number,
            weights=gates.weighed(weights, self._release),
            metrics=gates.measured(metrics, self._release, p.federation.privacy),
            loss=gates.told(loss, p.federation.privacy),
            seconds=time.monotonic() - started,
            tensors=leaving,
        )
        return private.keep(request, reply) if private else reply

    def _told(self, p: Participation, splits: tuple[Split, ...]) -> tuple[Split, ...]:
        """The splits to measure: without exact figures only the test split, whose predictions the site keeps."""
        exact = not p.federation.privacy or p.federation.privacy.exact
        return tuple(split for split in splits if split == "test" or exact)

    def _randomness(self, p: Participation, this: Round) -> AbstractContextManager[None]:
        """Of masks, dropout and the order of studies: repeatable, but secret where privacy must not depend on it."""
        return unpredictable() if p.private else seeded(p.federation.seed, self.name, this.number)

    def _patients(self, p: Participation, stage: Stage) -> int:
        """How many patients a stage trains on, as it may be told."""
        return self._release.count(len(patients_of(p.dataset, p.dataset.rows("train", list(stage.tasks)))))

    def _trained(self, p: Participation, stage: Stage) -> list[str]:
        return [name for name, fate in p.fates.items() if fate != "frozen" and matches(name, stage.train)]

    def _measure(self, p: Participation, state: str, splits: tuple[Split, ...]) -> list[Metric]:
        metrics = []
        privacy = p.federation.privacy
        for split in splits:
            for predictions in predict(p.model, p.dataset, split):
                if not privacy or privacy.exact:
                    metrics += metrics_of(predictions, p.federation, split, state)
                elif privacy.figures == "noised" and (state, split) == ("shared", "test"):
                    metrics += noised_metrics(predictions.head, predictions.table, p.federation)
                if split == "test":
                    write_predictions(self.directory, p.document, state, predictions)
            if split == "test" and (not privacy or privacy.exact):
                metrics += self._measure_subsets(p, state)
        return metrics

    def _measure_subsets(self, p: Participation, state: str) -> list[Metric]:
        asked = [head for head, evaluation in p.federation.evaluation.items() if evaluation.subsets]
        metrics = []
        for modalities in subsets(p.dataset.everything.inputs) if asked else ():
            for predictions in predict(p.model, p.dataset, "test", asked, modalities):
                measured = metrics_of(predictions, p.federation, "test", state)
                metrics += [replace(metric, modalities="+".join(modalities)) for metric in measured]
        return metrics


def block_weights(model: Model, dataset: Dataset, this: Round, leaving: Tensors) -> dict[str, float]:
    """The training studies behind each block that leaves: for an encoder, those that had one of its modalities."""
    assert this.stage
    weights: dict[str, float] = {}
    rows, everything = dataset.rows("train", list(this.stage.tasks)), dataset.everything
    for block in {block_of(name) for name in leaving}:
        kind, _, name = block.partition(".")
        if kind == "encoders":
            through = [everything.present[m] for m in model.behind(name) if m in everything.present]
            weights[block] = float(torch.stack(through).any(0)[rows].sum())
        elif kind in ("heads", "objectives"):
            weights[block] = float(everything.usable[name][rows].sum())
        else:
            weights[block] = float(len(rows))
    return weights


def controls_of(federation: Federation, this: Round, shared: Tensors) -> Tensors:
    """What a round's control variates look like, by the names they have in a message; none without SCAFFOLD."""
    if federation.aggregation.strategy.type != "scaffold" or not this.returns_tensors:
        return {}
    return {CONTROL + name: tensor for name, tensor in shared.items() if tensor.dtype.kind == "f"}


def interpolations(p: Participation, stage: Stage, share: float) -> list[Metric]:
    """How far the site went from the shared state to its adapted one, as a figure of each head that was adapted."""
    heads = [name for name in stage.tasks if name in p.model.heads]
    counts = {name: len(p.dataset.rows("val", [name])) for name in heads}
    return [Metric(name, "adapted", "val", "interpolation", share, count) for name, count in counts.items()]
