"""The sites of a simulation in one process: what costs memory is shared between them, or held for a few at a time."""

from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path

from client.agent import Agent, Build
from client.relay import Answer, Ask, Question
from mmfm_core.artifacts import artifacts_of
from mmfm_core.config.model import Model
from mmfm_core.models.model import MultimodalModel

HELD = 128  # sites whose data stays in memory; another one's is read again from its files when it is asked


class Hospitals:
    """The agents of sites. Each works as it would alone; here only one works at a time."""

    def __init__(self, agents: list[Agent], held: int = HELD) -> None:
        self._agents, self._held = agents, held
        self._recent: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._agents)

    def participate(self, document: str) -> None:
        """Have every site load what a document needs of it.

        Raises:
            MmfmError: see `Agent.participate`.
        """
        for index, agent in enumerate(self._agents):
            agent.participate(document)
            self._use(index)

    def ask(self, index: int) -> Ask:
        """What asks the site `index`."""

        def ask(question: Question) -> Answer:
            answer = self._agents[index].answer(question)
            self._use(index)
            return answer

        return ask

    def _use(self, index: int) -> None:
        self._recent[index] = None
        self._recent.move_to_end(index)
        if len(self._recent) > self._held:
            longest_ago, _ = self._recent.popitem(last=False)
            self._agents[longest_ago].forget()


def shared_models() -> Build:
    """A builder that gives sites with the same parts the same model: every round sets the whole of its state."""
    known: dict[tuple[str, frozenset[str], frozenset[str], int, Path | None], MultimodalModel] = {}

    def build(
        config: Model, modalities: Collection[str], targets: Collection[str], seed: int, artifacts: Path
    ) -> MultimodalModel:
        files = artifacts.resolve() if artifacts_of(config) else None  # each site links to them from its own folder
        alike = (config.model_dump_json(), frozenset(modalities), frozenset(targets), seed, files)
        if alike not in known:
            known[alike] = MultimodalModel(config, modalities, targets, seed, artifacts)
        return known[alike]

    return build
