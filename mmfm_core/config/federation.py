"""The federation's document: one immutable text that says everything that will happen, and that a site approves."""

from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from mmfm_core.config.model import Model
from mmfm_core.config.privacy import Privacy, leaks
from mmfm_core.config.strict import Name, Strict, did_you_mean

Fate = Literal["shared", "local", "frozen"]
Share = Annotated[float, Field(ge=0, le=1)]


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
        local_first: so many of the local steps train what is local alone, and the others what is shared alone (FedRep,
            Collins et al. 2021). With 0, all steps train both.
        personal: lambda of Ditto (Li et al. 2021): after its part in the round, a site trains a model of its own for as
            many steps, held to the shared state so strongly. It is what the site ends with. With 0 there is none.
        interpolate: of an adaptation, how far a site may go from the shared state to its adapted one: it takes what its
            own validation patients speak for, and stays near the shared state where they cannot tell
            (`client.adaptation`).
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
    local_first: NonNegativeInt = 0
    personal: NonNegativeFloat = 0.0
    interpolate: tuple[Share, ...] = Field(default=(0.0, 0.25, 0.5, 0.75, 1.0), min_length=1)

    @model_validator(mode="after")
    def _fits_together(self) -> "Stage":
        if not self.federated and self.rounds != 1:
            raise ValueError("rounds: a stage that is not federated has no rounds; give it local_steps")
        if not self.federated and self.personal:
            raise ValueError("personal: an adaptation makes a model of the site's own already; leave it out")
        if self.local_first >= self.local_steps:
            raise ValueError("local_first: leaves no step of local_steps for what is shared; lower it")
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


class Scaffold(Strict):
    """FedAvg, and every site corrects its gradients by how they differ from all sites' (Karimireddy et al. 2020).

    Coordinator and sites keep a control variate per shared parameter, which doubles what a round sends.
    """

    type: Literal["scaffold"]


def _with_defaults(strategy: object) -> object:
    """A name alone stands for the strategy with its defaults."""
    return {"type": strategy} if isinstance(strategy, str) else strategy


UpdateFormat = Literal["fp32", "fp16", "int8"]


class Wire(Strict):
    """In how many bits parameters travel (`mmfm_core.compression`).

    Attributes:
        state: the shared state, to the sites. The coordinator keeps it in full precision and adds updates to that.
        update: what a site changed, to the coordinator. What rounding takes is added to its next update.
    """

    state: Literal["fp32", "fp16"] = "fp32"
    update: UpdateFormat = "fp32"


class Aggregation(Strict):
    """How replies become the next shared state, and how long the coordinator waits (seconds).

    Attributes:
        weight: 'studies_with_modality' averages each block over the sites that hold it, by the studies behind it.
            'studies' averages whole models, by all studies: a site without a block counts as if it had left it as it
            was, which holds rare modalities back. It is there to compare with.
        ema: the decay of a running mean over the rounds' shared states, which then is the one that is measured, adapted
            and kept at the end; 0 keeps the last round's. It evens noise out and costs no privacy (De et al. 2022).
        sites_per_round: how many sites are drawn for each federated round, of those that have something to train on;
            all of them where it is not given. What sites adapt or measure for themselves is never left to chance.
    """

    strategy: Annotated[
        Annotated[FedAvg | FedAdam | FedYogi | Scaffold, Field(discriminator="type")], BeforeValidator(_with_defaults)
    ] = FedAvg()
    weight: Literal["studies_with_modality", "studies"] = "studies_with_modality"
    ema: float = Field(default=0.0, ge=0, lt=1)
    min_sites: PositiveInt = 2
    sites_per_round: PositiveInt | None = None
    wire: Wire = Wire()
    quorum_wait: PositiveFloat = 600.0
    deadline: PositiveFloat = 1800.0

    @model_validator(mode="after")
    def _fits_together(self) -> "Aggregation":
        if self.sites_per_round is not None and self.sites_per_round < self.min_sites:
            raise ValueError(
                f"sites_per_round: {self.sites_per_round} sites can never give the replies of min_sites, "
                f"{self.min_sites}; raise it, or lower min_sites"
            )
        if self.strategy.type == "scaffold" and self.wire != Wire():
            raise ValueError("wire: SCAFFOLD's control variates travel in full precision; leave it out")
        return self


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
    privacy: Privacy | None = None
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
                noise = ", and has no noise, which later gradients of every patient would carry" * bool(self.privacy)
                raise ValueError(
                    f"stages.{index}: a federated stage cannot follow one that adapts at the sites; "
                    f"what a site adapted is never sent{noise}"
                )
        return self

    @model_validator(mode="after")
    def _methods_fit(self) -> "Federation":
        for index, stage in enumerate(self.stages):
            if stage.local_first and not self.parameters.local:
                raise ValueError(f"stages.{index}.local_first: nothing is local; name it in parameters.local")
            if self.aggregation.strategy.type == "scaffold" and stage.federated and stage.optimizer.type != "sgd":
                raise ValueError(f"stages.{index}.optimizer.type: SCAFFOLD corrects gradients; give it sgd")
            if not stage.federated and any(earlier.personal for earlier in self.stages[:index]):
                raise ValueError(
                    f"stages.{index}: sites that train a 'personal' model end with that one; take out this stage, or "
                    "'personal'"
                )
        return self

    @model_validator(mode="after")
    def _can_be_private(self) -> "Federation":
        if self.privacy:
            federated = {task for stage in self.stages if stage.federated for task in stage.tasks}
            if not federated:
                raise ValueError("privacy: no stage is federated, so that nothing leaves a site; leave it out")
            leak = next(leaks(self.model, {name: self.model.tasks[name] for name in sorted(federated)}), None)
            if leak:
                raise ValueError(leak)
        return self

    @model_validator(mode="after")
    def _evaluation_fits(self) -> "Federation":
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
        if self.privacy and self.privacy.figures == "noised" and not self.noised_heads:
            raise ValueError(
                "privacy.figures: only the 'auroc' of classification and findings can be 'noised', and it leads no "
                "head; name it first under evaluation, or withhold all figures"
            )
        return self

    @property
    def noised_heads(self) -> list[str]:
        """The heads that are led by an AUROC which can leave with noise."""
        return [name for name, head in self.model.heads.items() if head.ranked and self.metrics_of(name)[0] == "auroc"]

    def metrics_of(self, head: str) -> tuple[str, ...]:
        """What `head` is measured by; the first one leads."""
        return self.evaluation.get(head, Evaluation()).metrics or self.model.heads[head].METRICS
