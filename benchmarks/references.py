"""What a model must beat: baselines that learn next to nothing, from the very studies that a run used."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from client.loading import arrays, load
from mmfm_core.config import Federation, Site, load_site
from mmfm_core.data.dataset import Batch, load_dataset
from mmfm_core.data.manifest import read_manifest
from mmfm_core.models.model import full_model
from mmfm_core.training.evaluation import measure, predict
from server.record import Run

Reference = Callable[[Path, str, str, pd.DataFrame], float]
"""From a run, a head, a metric and the run's own table of predictions to the baseline's figure."""


def commonest_report(run: Path, head: str, metric: str, table: pd.DataFrame) -> float:
    """The commonest report of all sites' training studies, whatever the image."""
    federation = Run.open(run).federation
    written = Counter(
        study.targets[head]
        for site in _sites(run)
        for study in read_manifest(site, federation.model)
        if study.split == "train" and head in study.targets
    )
    ((commonest, _),) = written.most_common(1)
    return _value(federation, head, metric, table.assign(generated=commonest))


def dealt_to_others(run: Path, head: str, metric: str, table: pd.DataFrame) -> float:
    """The run's own reports, each dealt to another patient: what they say whatever the image. Mean of ten deals."""
    federation, random = Run.open(run).federation, np.random.default_rng(0)
    dealt = (table.assign(generated=random.permutation(table["generated"])) for _ in range(10))
    return float(np.mean([_value(federation, head, metric, one) for one in dealt]))


def chance(run: Path, head: str, metric: str, table: pd.DataFrame) -> float:
    """Five times what a random order finds."""
    return 5 * _value(Run.open(run).federation, head, metric.replace("_at_", "_chance_at_"), table)


def flair_threshold(run: Path, head: str, metric: str, table: pd.DataFrame) -> float:
    """Lesions are where FLAIR exceeds a threshold: the one with the best mean Dice on training studies."""
    return threshold(run, head, ("flair",))


def threshold(run: Path, head: str, contrasts: Collection[str]) -> float:
    """Lesions are where one of the contrasts is above, or below, a value: the three that are best on training studies.

    Intensities are normalised as the model sees them. Best is the mean Dice, and what is returned is that on test
    studies.
    """
    federation = Run.open(run).federation
    datasets = [load_dataset(site, federation.model) for site in _sites(run)]
    train, test = ([d.batch(d.rows(split, [head])) for d in datasets] for split in ("train", "test"))
    rules = [(c, sign, value) for c in contrasts for sign in (1, -1) for value in np.arange(-3.0, 6.0, 0.1)]
    best = max(rules, key=lambda rule: _dice_beyond(train, head, *rule))
    return _dice_beyond(test, head, *best)


def _dice_beyond(batches: list[Batch], head: str, contrast: str, sign: int, value: float) -> float:
    """Mean Dice over studies, as `mmfm_core.metrics.overlap.dice` has it, which takes minutes for all rules."""
    each = []
    for batch in (batch for batch in batches if len(batch)):
        found = (sign * batch.inputs[contrast][:, 0] > sign * value).flatten(1)
        true = batch.targets[head].flatten(1) > 0
        each += (2.0 * (found & true).sum(1) / (found.sum(1) + true.sum(1))).tolist()  # 0 / 0 is no Dice
    return float(np.nanmean(each))


def shown(run: Path, head: str, modalities: Collection[str]) -> pd.DataFrame:
    """What the last shared state predicts of test studies of which it sees no other modality."""
    federation = Run.open(run).federation
    model = full_model(federation.model, federation.seed)
    checkpoint = Run.open(run).checkpoint()
    assert checkpoint is not None
    load(model, arrays(model) | checkpoint[1])  # what is frozen is as it was built
    predicted = [
        p.table.assign(site=site.name, patient=site.name + "/" + p.table["patient"])
        for site in _sites(run)
        for p in predict(model, load_dataset(site, federation.model), "test", [head], modalities)
    ]
    return pd.concat(predicted, ignore_index=True)


def unmoved(run: Path, head: str, metric: str, table: pd.DataFrame) -> float:
    """Registration that does nothing."""
    return _value(Run.open(run).federation, head, f"{metric}_before", table)


def affine(run: Path, head: str, metric: str, table: pd.DataFrame) -> float:
    """Registration by an affine map alone: the same descent on each test pair, from the identity."""
    federation = Run.open(run).federation
    document = federation.model_dump(mode="json")
    document["model"]["heads"][head]["transform"] = "affine"
    model = Federation.model_validate(document).model
    moved = [p.table for s in _sites(run) for p in predict(full_model(model, 0), load_dataset(s, model), "test")]
    return _value(federation, head, metric, pd.concat(moved, ignore_index=True))


def _value(federation: Federation, head: str, metric: str, table: pd.DataFrame) -> float:
    value = measure(federation.model.heads[head], [metric], table)[metric][0]
    return np.nan if value is None else value


def _sites(run: Path) -> Iterator[Site]:
    for path in sorted(run.glob("sites/*/site.yaml")):
        yield load_site(path)


REFERENCES: dict[str, Reference] = {
    "affine": affine,
    "commonest report": commonest_report,
    "dealt to others": dealt_to_others,
    "five times chance": chance,
    "FLAIR threshold": flair_threshold,
    "unmoved": unmoved,
}
