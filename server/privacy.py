"""What patient-level privacy would ask of a federation: noise or epsilon by sampling rate, and each site's share."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from mmfm_core.config import Federation, Site
from mmfm_core.errors import MmfmError
from mmfm_core.models.parameters import fates_of, matches
from mmfm_core.privacy.accounting import composed, costs_of, epsilon, noise_for, tight_epsilon
from mmfm_core.protocol import SiteDescription
from mmfm_core.storage import Tensors

RATES = (0.05, 0.1, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Wish:
    """What is asked: the noise for an epsilon, or the epsilon of a noise multiplier; the other one is None."""

    epsilon: float | None
    noise: float | None
    delta: float

    def __post_init__(self) -> None:
        if (self.epsilon is None) == (self.noise is None):
            raise MmfmError("--epsilon and --noise: give one of them, the other one is what the plan answers")
        for option, value in (("--epsilon", self.epsilon), ("--noise", self.noise)):
            if value is not None and not 0 < value < math.inf:
                raise MmfmError(f"{option}: must be more than 0")
        if not 0 < self.delta < 1:
            raise MmfmError("--delta: must be between 0 and 1, and below one over the patients of a site")


@dataclass(frozen=True)
class Choice:
    """One sampling rate and what it costs.

    Attributes:
        rate: the chance of a patient to be in a step.
        drowned: site -> the noise of all steps over the most that its patients can contribute, as lengths of vectors.
    """

    rate: float
    noise: float
    epsilon: float
    tight: float
    drowned: dict[str, float]


def choices(federation: Federation, state: Tensors, sites: Sequence[SiteDescription], wish: Wish) -> list[Choice]:
    """What each of `RATES`, and the document's own, needs for all federated rounds, over all parameters they train."""
    steps = steps_of(federation)
    if not steps:
        raise MmfmError("stages: none is federated, so that nothing leaves a site that noise could protect")
    size = sum(state[name].size for name in _trained(federation, state))
    found = []
    for rate in sorted({*RATES, *([federation.privacy.rate] if federation.privacy else [])}):
        noise = wish.noise if wish.noise is not None else noise_for(wish.epsilon or 0, rate, steps, wish.delta)
        drowned = {
            # Over T steps noise of length s C sqrt(d) grows by sqrt(T), and q N clipped gradients at most by T.
            site.site: noise * math.sqrt(size) / (rate * site.patients["train"] * math.sqrt(steps))
            for site in sites
            if site.patients["train"]
        }
        spent, tight = (count(noise, rate, steps, wish.delta) for count in (epsilon, tight_epsilon))
        found.append(Choice(rate, noise, spent, tight, drowned))
    return found


def steps_of(federation: Federation) -> int:
    """Steps whose result leaves a site, over all rounds."""
    return sum(stage.rounds * stage.local_steps for stage in federation.stages if stage.federated)


def table(found: Sequence[Choice], wish: Wish, steps: int) -> Table:
    """A row per sampling rate."""
    of = f"ε {wish.epsilon:g}" if wish.epsilon is not None else f"noise multiplier {wish.noise:g}"
    shown = Table(
        title=f"Patient-level privacy: {steps} steps for {of}, δ {wish.delta:g}; and noise over signal at each site",
        title_justify="left",
    )
    for column in ("sampling rate", "noise multiplier", "ε (RDP, decides)", "ε (PLD)", *found[0].drowned):
        shown.add_column(column, justify="right", overflow="fold")
    for each in found:
        ratios = (f"{ratio:.1f}" for ratio in each.drowned.values())
        shown.add_row(f"{each.rate:g}", f"{each.noise:.3f}", f"{each.epsilon:.2f}", f"{each.tight:.2f}", *ratios)
    return shown


def warnings(found: Sequence[Choice], sites: Sequence[SiteDescription], wish: Wish) -> Iterator[str]:
    """Sites that are too small, in plain words."""
    best = {site: min(each.drowned[site] for each in found) for site in found[0].drowned}
    for site, ratio in best.items():
        if ratio > 1:
            yield (
                f"{site}: at every rate the noise of all steps is longer than all that its patients can contribute "
                f"({ratio:.1f} times at best); freeze more, or train adapters only"
            )
    for each in sites:
        if each.patients["train"] >= 1 / wish.delta:
            yield f"{each.site}: δ must be below one over its {each.patients['train']} training patients; lower --delta"


def beyond_budgets(federation: Federation, files: Mapping[str, Site]) -> Iterator[str]:
    """Sites whose own budget is less than what the document would cost, even if nothing of it is spent yet."""
    costs = costs_of(federation)
    for name, site in files.items():
        cost = composed(costs, site.budget.delta)
        if cost > site.budget.epsilon:
            yield (
                f"{name}: all rounds would cost its patients ε {cost:.3f} at δ {site.budget.delta:g}, and its budget "
                f"is ε {site.budget.epsilon:g}: it will refuse the last ones; lower privacy.epsilon or privacy.delta"
            )


def _trained(federation: Federation, state: Tensors) -> list[str]:
    patterns = [pattern for stage in federation.stages if stage.federated for pattern in stage.train]
    return [n for n, fate in fates_of(federation, state).items() if fate != "frozen" and matches(n, patterns)]
