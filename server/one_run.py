"""The one-run audit of a federation: canaries at sites that are whole but for their data, and a coordinator that looks.

Everything between a patient's gradient and the bound is what a run would use: the site's agent with its gates and its
ledger, training, the private step with its engine, noise and optimiser, and the coordinator's strategy. What the
attacker has is what a coordinator sees: every message, and which parameter is whose.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from client.agent import Agent
from client.gates import approve
from client.loading import arrays
from mmfm_core.config import Federation
from mmfm_core.config.loading import sha256
from mmfm_core.config.rounds import Round, rounds_of
from mmfm_core.config.site import Budget, Release
from mmfm_core.errors import MmfmError
from mmfm_core.models.parameters import fates_of, held
from mmfm_core.privacy.audit.bound import Bound, bound
from mmfm_core.privacy.audit.canaries import SHARED, document_of, model_of, patients_of
from mmfm_core.privacy.randomness import Floats, chosen
from mmfm_core.protocol import Describe, RoundReply, RoundRequest, SiteDescription
from server.strategy import Strategy

SITES = ("east", "west")


@dataclass(frozen=True)
class OneRun:
    """What the audit found, and what the sites' ledgers allow.

    Attributes:
        found: the bound on epsilon, at `delta`.
        promised: the most that a site's ledger says its patients have paid; None without privacy.
    """

    found: Bound
    promised: float | None
    delta: float


def one_run(federation: Federation, canaries: int, told: Callable[[int, int], None] = lambda done, of: None) -> OneRun:
    """Train the document's rounds on canaries, and guess who was there; `told` hears of rounds done, and of how many.

    Raises:
        MmfmError: a site refused a round.
    """
    document = document_of(federation)
    included = chosen(canaries, 0.5)
    owner = np.arange(canaries) % len(SITES)
    with TemporaryDirectory() as folder:
        agents = {
            name: _agent(Path(folder) / name, name, document, canaries, np.flatnonzero(included & (owner == index)))
            for index, name in enumerate(SITES)
        }
        scores, promised = _scores(document, agents, canaries, owner, told)
    delta = document.privacy.delta if document.privacy else 0.0
    return OneRun(bound(scores, included, delta), promised, delta)


def _agent(directory: Path, name: str, document: Federation, canaries: int, included: np.ndarray) -> Agent:
    dataset = patients_of(document, included.tolist())
    privacy = document.privacy
    budget = Budget(epsilon=privacy.epsilon, delta=privacy.delta) if privacy else None
    approve(directory / "approved", document)
    return Agent(directory, name, Release(), lambda _: dataset, budget, build=partial(model_of, document, canaries))


def _scores(
    document: Federation,
    agents: dict[str, Agent],
    canaries: int,
    owner: np.ndarray,
    told: Callable[[int, int], None],
) -> tuple[Floats, float | None]:
    """How far its site moved each canary's parameter, [canaries], and what that has cost by the ledger."""
    initial = arrays(model_of(document, canaries))
    strategy = Strategy(document, {name: initial[name].copy() for name in held(fates_of(document, initial), "shared")})
    sites = {name: _described(agent, document) for name, agent in agents.items()}
    rounds = [this for this in rounds_of(document) if this.returns_tensors]
    scores, promised = np.zeros(canaries), None
    for this in rounds:
        for index, (name, agent) in enumerate(agents.items()):
            sent = {n: strategy.state_for(this)[n].copy() for n in strategy.tensors_for(sites[name], this)}
            reply = _reply(agent, document, this, sent)
            strategy.fold(reply, sites[name], this)
            # Downhill, as gradients of canaries point upwards.
            moved = (sent[SHARED].astype(np.float64) - reply.tensors[SHARED])[0]
            scores += np.where(owner == index, moved, 0.0)
            promised = reply.epsilon if promised is None else max(promised, reply.epsilon or 0.0)
        strategy.advance(sites.values())
        told(this.number, len(rounds))
    return scores, promised


def _described(agent: Agent, document: Federation) -> SiteDescription:
    answer = agent.answer(Describe(sha256(document)))
    if not isinstance(answer, SiteDescription):
        raise MmfmError(f"the audit's site {agent.name} refused: {getattr(answer, 'reason', answer)}")
    return answer


def _reply(agent: Agent, document: Federation, this: Round, sent: dict[str, np.ndarray]) -> RoundReply:
    answer = agent.answer(RoundRequest(sha256(document), this.number, sent))
    if not isinstance(answer, RoundReply):
        raise MmfmError(f"the audit's site {agent.name} refused: {getattr(answer, 'reason', answer)}")
    return answer
