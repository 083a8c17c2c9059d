"""The rounds that a document means: the one list that coordinator and sites both derive from it."""

from dataclasses import dataclass

from mmfm_core.config.federation import Federation, Stage


@dataclass(frozen=True)
class Round:
    """One exchange: the sites evaluate what they receive, then train, in a single message.

    Attributes:
        number: counts from 1 over the whole document.
        stage: what is trained; None for the last look at the final shared state.
        after_last_upload: the shared state that arrives is final, so it is also measured on the test split.
    """

    number: int
    stage: Stage | None
    after_last_upload: bool

    @property
    def returns_tensors(self) -> bool:
        """Whether trained parameters leave the sites in this round."""
        return self.stage is not None and self.stage.federated

    @property
    def name(self) -> str:
        """The stage's name, or 'evaluate'."""
        return self.stage.name if self.stage else "evaluate"


def rounds_of(federation: Federation) -> list[Round]:
    """All rounds in order. A document that ends with a federated stage gets one more round that only evaluates."""
    stages: list[Stage | None] = [s for s in federation.stages for _ in range(s.rounds)]
    if federation.stages[-1].federated:
        stages.append(None)
    return [Round(number, stage, stage is None or not stage.federated) for number, stage in enumerate(stages, 1)]
