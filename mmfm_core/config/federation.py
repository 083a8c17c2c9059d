"""The federation's document: one immutable text that says everything that will happen, and that a site approves."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from mmfm_core.config.model import Model
from mmfm_core.config.strict import Name, Strict, did_you_mean

Fate = Literal["shared", "local", "frozen"]


class Optimizer(Strict):
    """AdamW (Loshchilov & Hutter 2019), or SGD without momentum; afresh in each round: a site keeps no hidden state."""

    type: Literal["adamw", "sgd"] = "adamw"
    lr: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.01


class Task(Strict):
    """How a stage trains one head or objective."""

    weight: PositiveFloat = 1.0


class Stage(Strict):
    """Rounds with their own tasks and trainable parts; `federated: false` is adaptation at each site, sent nowhere.

    Attributes:
        train: patterns of what is trained.
        proximal: mu of FedProx (Li et al. 2020): how strongly shared parameters are held to what the round began with.
    """

    name: Name
    federated: bool = True
    rounds: PositiveInt = 1
    local_steps: PositiveInt = 10
    batch_size: PositiveInt = 16
    tasks: dict[Name, Task] = Field(min_length=1)
    train: tuple[str, ...] = ("*",)
    optimizer: Optimizer = Optimizer()
    proximal: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _adaptation_has_no_rounds(self) -> "Stage":
        if not self.federated and self.rounds != 1:
            raise ValueError("rounds: a stage that is not federated has no rounds; give it local_steps")
        return self


class Parameters(Strict):
    """Glob patterns over state-dict names. A name in several lists is frozen before local before shared."""

    shared: tuple[str, ...] = ("*",)
    local: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()


class FedAvg(Strict):
    """The sites' mean is the next shared state (McMahan et al. 2017)."""

    type: Literal["fedavg"] = "fedavg"


class FedAdam(Strict):
    """The sites' mean is where Adam steps to, at the coordinator (Reddi et al. 2021, algorithm 2).

    Attributes:
        lr: of the coordinator; near the size of a parameter's change in a round.
        beta1, beta2: of the running means of a change and its square.
        tau: the adaptivity; larger is nearer to FedAvg with momentum.
    """

    type: Literal["fedadam"]
    lr: PositiveFloat = 0.01
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.99, ge=0, lt=1)
    tau: PositiveFloat = 1e-3


class FedYogi(FedAdam):
    """FedAdam whose running square forgets more slowly after large changes (Reddi et al. 2021, algorithm 2)."""

    type: Literal["fedyogi"]  # type: ignore[assignment]


def _with_defaults(strategy: object) -> object:
    """A name alone stands for the strategy with its defaults."""
    return {"type": strategy} if isinstance(strategy, str) else strategy


class Aggregation(Strict):
    """How replies become the next shared state, and how long the coordinator waits (seconds)."""

    strategy: Annotated[
        Annotated[FedAvg | FedAdam | FedYogi, Field(discriminator="type")], BeforeValidator(_with_defaults)
    ] = FedAvg()
    weight: Literal["studies_with_modality"] = "studies_with_modality"
    min_sites: PositiveInt = 2
    quorum_wait: PositiveFloat = 600.0
    deadline: PositiveFloat = 1800.0


class Evaluation(Strict):
    """What each site measures on its own patients.

    Attributes:
        metrics: the first one leads in reports, and comes with intervals; all that the head has where none is named.
        subsets: whether the test patients are measured with every subset of their modalities too.
    """

    metrics: tuple[str, ...] = ()
    subsets: bool = False


class Federation(Strict):
    """The document. Its hash (`mmfm_core.config.loading.sha256`) is what a site approves."""

    name: Name
    seed: int = 0
    model: Model
    stages: tuple[Stage, ...] = Field(min_length=1)
    parameters: Parameters = Parameters()
    aggregation: Aggregation = Aggregation()
    evaluation: dict[Name, Evaluation] = {}

    @model_validator(mode="after")
    def _fits_together(self) -> "Federation":
        names = [stage.name for stage in self.stages]
        for index, stage in enumerate(self.stages):
            for task in stage.tasks:
                if task not in self.model.tasks:
                    raise ValueError(
                        f"stages.{index}.tasks.{task}: there is no such head or objective; "
                        f"{did_you_mean(task, self.model.tasks)}"
                    )
            if names.count(stage.name) > 1:
                raise ValueError(f"stages.{index}.name: '{stage.name}' is used twice")
            if stage.federated and not all(earlier.federated for earlier in self.stages[:index]):
                raise ValueError(
                    f"stages.{index}: a federated stage cannot follow one that adapts at the sites; "
                    "what a site adapted is never sent"
                )
        for head, evaluation in self.evaluation.items():
            if head not in self.model.heads:
                raise ValueError(f"evaluation.{head}: there is no such head; {did_you_mean(head, self.model.heads)}")
            known = self.model.heads[head].METRICS
            for metric in evaluation.metrics:
                if metric not in known:
                    raise ValueError(
                        f"evaluation.{head}.metrics: {self.model.heads[head].type} is not measured by '{metric}'; "
                        f"{did_you_mean(metric, known)}"
                    )
            if evaluation.metrics[:1] and evaluation.metrics[0] in self.model.heads[head].LOWER_IS_BETTER:
                raise ValueError(
                    f"evaluation.{head}.metrics: the first metric leads, and of '{evaluation.metrics[0]}' less is "
                    "better; name another one first"
                )
        return self

    def metrics_of(self, head: str) -> tuple[str, ...]:
        """What `head` is measured by; the first one leads."""
        return self.evaluation.get(head, Evaluation()).metrics or self.model.heads[head].METRICS
