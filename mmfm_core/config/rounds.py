"""The rounds that a document means: the one list that coordinator and sites both derive from it."""

from dataclasses import dataclass

from mmfm_core.config.federation import Federation, Stage
from mmfm_core.config.site import Split


@dataclass(frozen=True)
class Round:
    """One exchange: the sites evaluate what they receive, then train, in a single message.

    Attributes:
        number: counts from 1 over the whole document.
        stage: what is trained; None for a last look at the final shared state.
        evaluates: the splits on which the state as received is measured, before training.
    """

    number: int
    stage: Stage | None
    evaluates: tuple[Split, ...]

    @property
    def returns_tensors(self) -> bool:
        """Whether trained parameters leave the sites in this round."""
        return self.stage is not None and self.stage.federated

    @property
    def name(self) -> str:
        """The stage's name, or 'evaluate'."""
        return self.stage.name if self.stage else "evaluate"


def rounds_of(federation: Federation) -> list[Round]:
    """All rounds in order.

    The first round after the last upload measures the final shared state on the test split too; a document that ends
    with a federated stage gets one more round for that. Stages that adapt further start from each site's own adapted
    state, which is not measured again as 'shared'.
    """
    stages: list[Stage | None] = [stage for stage in federation.stages for _ in range(stage.rounds)]
    if federation.stages[-1].federated:
        stages.append(None)
    first_final = next(i for i, stage in enumerate(stages) if stage is None or not stage.federated)
    rounds = []
    for index, stage in enumerate(stages):
        splits: tuple[Split, ...] = ("val",) if index < first_final else ("val", "test") if index == first_final else ()
        rounds.append(Round(index + 1, stage, splits))
    return rounds
