"""The `privacy` part of the document: patient-level differential privacy, and what of a document cannot be private."""

from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from mmfm_core.config.modality import NumericFeature, TableModality, TextModality
from mmfm_core.config.model import Model
from mmfm_core.config.part import TaskConfig
from mmfm_core.config.strict import Strict

SEPARABLE = "train masked_image, masked_text or a report head instead, whose losses are of one patient each"


class Privacy(Strict):
    """Differential privacy of each patient at each site, neighbours differing by one patient (add or remove).

    Every site adds the whole noise itself, so that its patients are protected from the coordinator and from other
    sites (`trust: local`). In each step every training patient takes part with the chance `rate`, with all studies;
    the patient's one gradient is clipped to `max_grad_norm` over all parameters that are trained, shared and local.

    Attributes:
        epsilon, delta: what all federated rounds together may cost a patient.
        noise: the noise multiplier; without it, the least that keeps all rounds within `epsilon`.
        views: how often a patient passes through the model in a step, each time with other masks and dropped parts;
            the mean over them is one gradient, so that they cost time and no privacy (De et al. 2022).
        shrink: patterns of the shared matrices of which the coordinator takes noise back in part at the end
            (`server.shrinking`): where many outputs learn alike, as findings do, they lend each other strength. It
            costs no privacy, and expects noise of one strength in all entries, as that of sgd is. One of fewer than
            three rows or columns stays as it is.
        engine: how gradients of patients are computed (`mmfm_core.privacy.engines`); all give the same sum.
        figures: metrics and losses are 'withheld'; or withheld but for the AUROC of the final shared model on test
            patients, which leaves 'noised' and is charged as a step is (`mmfm_core.privacy.figures`); or all leave
            'exact', which epsilon does not cover.
        figure_noise: the noise multiplier of noised figures.
        counts: how many studies and patients a site has, rounded as its policy says, is taken as public.
    """

    unit: Literal["patient"] = "patient"
    trust: Literal["local"] = "local"
    epsilon: PositiveFloat
    delta: float = Field(gt=0, lt=1)
    rate: float = Field(gt=0, le=1)
    max_grad_norm: PositiveFloat = 1.0
    noise: PositiveFloat | None = None
    views: PositiveInt = 1
    shrink: tuple[str, ...] = ()
    engine: Literal["auto", "loop", "bookkeeping", "hooks"] = "auto"
    figures: Literal["withheld", "noised", "exact"] = "withheld"
    figure_noise: PositiveFloat = 2.0
    counts: Literal["public"] = "public"

    @property
    def exact(self) -> bool:
        """Whether metrics and losses leave a site as they are."""
        return self.figures == "exact"


def leaks(model: Model, tasks: Mapping[str, TaskConfig]) -> Iterator[str]:
    """What of a document would make a patient's gradient depend on other patients, as 'FIELD: why; remedy'."""
    for name, task in tasks.items():
        if not task.PER_SAMPLE:
            kind = "heads" if name in model.heads else "objectives"
            yield f"model.{kind}.{name}: {task.type} compares patients, so that none has a gradient alone; {SEPARABLE}"
    for name, modality in model.modalities.items():
        if isinstance(modality, TextModality):
            continue
        if isinstance(modality, TableModality):
            numeric = {n: f for n, f in modality.features.items() if isinstance(f, NumericFeature)}
            by_site = [f"features.{n}.normalize" for n, f in numeric.items() if f.normalize == "site"]
            remedy = "declare a public {mean: ..., std: ...}"
        else:
            by_site = ["normalize"] * (modality.normalize == "site")
            remedy = "use 'study', or declare a public {mean: ..., std: ...}"
        for field in by_site:
            yield f"model.modalities.{name}.{field}: 'site' is a mean over patients, which has no noise; {remedy}"
