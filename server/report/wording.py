"""What the report says in words: every sentence is made from the run's numbers, and claims no more than they show."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmfm_core.config import Federation
from mmfm_core.config.rounds import rounds_of
from server.report.results import TaskResult

METRICS = {
    "auroc": (
        "AUROC",
        "Area under the ROC curve: how often the model ranks a patient with the condition above one "
        "without it. 0.5 is a coin toss, 1 is perfect. With several classes, the average over them.",
    ),
    "auprc": (
        "AUPRC",
        "Area under the precision-recall curve: how many of the flagged patients are true cases, over "
        "all thresholds. A coin toss scores the share of cases, 1 is perfect.",
    ),
    "f1": ("F1", "The balance between finding the cases and raising no false alarms. 1 is perfect."),
    "accuracy": (
        "Accuracy",
        "The share of patients classified rightly. Where one class is rare, always guessing the "
        "other one scores high too.",
    ),
    "dice": ("Dice", "Overlap of the drawn and the true region: 1 is the same region, 0 is no overlap."),
    "dice_before": ("Dice, unregistered", "The same overlap before the images were brought together."),
    "tre": (
        "Landmark error",
        "How far apart landmarks, or curves, are after registration (TRE), in mm, or pixels of 2D images. Lower is "
        "better.",
    ),
    "tre_before": ("Landmark error, unregistered", "The same distance before the images were brought together."),
    "folding": (
        "Folding",
        "The share of the image where the deformation is not one to one, which no tissue can do. Lower is better.",
    ),
    "similarity": (
        "Similarity",
        "How alike the registered images are, by the measure that the model is trained with. Higher is better.",
    ),
    "similarity_before": ("Similarity, unregistered", "The same before the images were brought together."),
    "hd95": (
        "Boundary error (HD95)",
        "How far the outlines are apart at their 95th percentile, in pixels or voxels of the model. Lower is better.",
    ),
    "map50": (
        "mAP at IoU 0.5",
        "Average precision of the detected boxes, over all thresholds and classes; a box counts where it overlaps a "
        "true one by half.",
    ),
    "map": ("mAP", "Average precision of the detected boxes, over overlaps from 0.5 to 0.95."),
    "bleu4": ("BLEU-4", "How many word sequences of up to four words the written and the true report share."),
    "rouge_l": ("ROUGE-L", "The longest common sequence of words of the written and the true report."),
    "finding_f1": (
        "Finding F1",
        "Whether the written and the true report state the same findings, as a rule-based reader finds them.",
    ),
    "finding_f1_macro": (
        "Finding F1, macro",
        "The same for each finding alone, then averaged, so that rare findings count as much as common ones.",
    ),
    "distinct": (
        "Distinct reports",
        "The share of written reports that differ from all others; near 0 it repeats itself.",
    ),
    "recall_at_10": (
        "Recall@10",
        "How often the right partner is among the first ten found, from image to text and back.",
    ),
    "image_to_text_at_10": ("Image to text@10", "How often an image's own report is among the first ten found."),
    "text_to_image_at_10": ("Text to image@10", "How often a report's own image is among the first ten found."),
    "recall_at_1": ("Recall@1", "How often the right partner is the first one found, from image to text and back."),
    "recall_at_5": ("Recall@5", "How often the right partner is among the first five found."),
    "mrr": ("Mean reciprocal rank", "One over the place of the right partner, on average: 1 is always the first."),
    "image_to_text_chance_at_10": ("Image to text@10 by chance", "What guessing would reach."),
    "text_to_image_chance_at_10": ("Text to image@10 by chance", "What guessing would reach."),
    "ece": (
        "Calibration error",
        "How far the stated probabilities are from what happened, on average (ECE). 0 is perfect, lower is better.",
    ),
}
"""Metric -> its name for people and its meaning in one line."""

RANKING = ("auroc", "auprc")
"""Metrics of an order of patients, which need a few of every class."""

LABELS = {"local-only": "Local only", "fedavg": "FedAvg", "adapted": "FedAvg + adapted head", "pooled": "Pooled data"}

_MODEL = {
    "local-only": "training alone",
    "fedavg": "the shared FedAvg model",
    "adapted": "the adapted model",
    "pooled": "training on pooled data",
}

_SHORT = {"local-only": "local only", "fedavg": "FedAvg", "adapted": "adapted", "pooled": "pooled"}

_COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

_NAMED = 4  # more hospitals than these in a sentence are counted, not listed


def meanings(federation: Federation) -> dict[str, str]:
    """Each method in one line."""
    parts = ", ".join(dict.fromkeys(p for stage in federation.stages if not stage.federated for p in stage.train))
    return {
        "local-only": "Each hospital trained the same kind of model alone, on its own patients.",
        "fedavg": "One model trained by all hospitals together: after each round its parameters are averaged.",
        "adapted": "The FedAvg model, a part of which each hospital then trained further on its own patients and kept"
        + (f" ({parts})." if parts else "."),
        "pooled": "One model trained on all data in one place, if that were allowed: a reference, not an option.",
    }


def opening(federation: Federation, facts: Mapping[str, Any], done: set[int], simulated: bool) -> str:
    """Who did what together, and what left them."""
    count = len(facts.get("sites") or {})
    if not count:
        return "No hospital has taken part in this run yet."
    plan = rounds_of(federation)
    together = [this.number for this in plan if this.returns_tensors]
    finished = len(done.intersection(together))
    length = f"over {number(finished, 'round')}"
    if finished < len(together):
        length = f"for {finished} of the {number(len(together), 'planned round')}"
    left = {1: "it", 2: "either of them"}.get(count, "any of them")
    said = [
        f"{number(count, 'hospital').capitalize()} trained one model together {length}; no patient's record left "
        f"{left}, only model parameters, counts and measurements did."
    ]
    if any(this.stage and not this.stage.federated and this.number in done for this in plan):
        said.append("Afterwards each hospital adapted a part of the model to its own patients and kept it to itself.")
    if simulated:
        said.append(
            "This was a simulation: all hospitals' data lay on the machines that ran it, which is what allows "
            "the methods to be compared patient by patient."
        )
    return " ".join(said)


def state(facts: Mapping[str, Any], done: set[int]) -> tuple[str, str]:
    """The run's status in a word, and in a sentence wherever it did not simply end well."""
    status = str(facts.get("status", "unknown"))
    reached = f"after {max(done, default=0)} of {facts.get('rounds', 'an unknown number of')} rounds"
    cause = f": {str(facts['cause']).rstrip('.')}" if facts.get("cause") else ""
    return status, {
        "completed": "",
        "failed": f"This run failed {reached}{cause}. What follows is what it left, not a result.",
        "interrupted": f"This run was interrupted {reached}{cause}. What follows is not its result yet.",
    }.get(status, f"This run is not over: it is {status}, {reached}{cause}. What follows is not its result yet.")


def findings(task: TaskResult) -> list[str]:
    """What a task's table says, beginning with the averages and ending with what could not be measured."""
    name = METRICS.get(task.metric, (task.metric, ""))[0]
    known = [method for method in task.methods if task.mean_of_sites.get(method) is not None]
    if not known:
        return [f"{name} for “{task.task}” is undefined at every hospital: fewer than five test patients of a class."]
    means = [f"{figure(task.mean_of_sites[method])} for {_MODEL[method]}" for method in known]
    where = max(len(task.defined(method)) for method in known)
    said = [
        f"{name} for “{task.task}” on patients kept apart for testing is {listed(means)}, averaged over "
        f"{number(where, 'hospital')}."
    ]
    said += [_difference(task, pair) for pair in task.differences]
    told = [found for site in task.sites for found in site.differences.values() if found.has_interval]
    if any(found.sign for found in told):
        said.append(
            f"That is out of {number(len(told), 'difference')} looked at: where nothing differs, about one in "
            "twenty stands out by chance alone."
        )
    if not task.differences and len(known) > 1:
        said.append(
            "Whether these differ by more than chance is not known: that takes each patient's prediction under "
            "both models side by side, and this run holds no such comparison."
        )
    gaps = [site.site for site in task.sites if all(found.value is None for found in site.results.values())]
    if gaps:
        said.append(f"{name} is undefined at {listed(gaps)}: fewer than five test patients of a class.")
    return said


def _difference(task: TaskResult, pair: str) -> str:
    this, other = (_MODEL.get(method, method) for method in pair.split(" - ", 1))
    known = [site for site in task.sites if pair in site.differences and site.differences[pair].has_interval]
    if not known:
        return f"Whether {this} differs from {other} could not be determined at any hospital."
    gain = -1 if task.lower_is_better else 1
    better = [site.site for site in known if site.differences[pair].sign == gain]
    worse = [site.site for site in known if site.differences[pair].sign == -gain]
    if not better and not worse:
        return (
            f"Between {this} and {other} there is no difference beyond what chance explains, at any of "
            f"{number(len(known), 'hospital')}."
        )
    told = [
        f"{word} at {_word(len(sites))} of {number(len(known), 'hospital')} ({listed(sites)})"
        for word, sites in (("better", better), ("worse", worse))
        if sites
    ]
    rest = len(known) - len(better) - len(worse)
    end = f"; at the other {_word(rest)} there is no clear difference." if rest else "."
    return f"Compared with {other}, {this} is {listed(told)}, beyond what chance explains{end}"


def pair_label(pair: str) -> str:
    """A paired difference as a column's head."""
    label = " minus ".join(_SHORT.get(method, method) for method in pair.split(" - "))
    return label[:1].upper() + label[1:]


def figure(value: float | None) -> str:
    """Three decimals."""
    return "–" if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    """Three decimals and the sign, with a minus that is as wide as the plus."""
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")


def percent(share: float) -> str:
    """Whole percent, in which little is not nothing and nearly all is not all."""
    return "< 1 %" if 0 < share < 0.01 else "> 99 %" if 0.99 < share < 1 else f"{100 * share:.0f} %"


def size(count: float) -> str:
    """Bytes for people."""
    if count < 1000:
        return f"{count:.0f} bytes"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"


def number(count: int, noun: str) -> str:
    """'four hospitals', 'one round', '26 rounds': words for the few."""
    return f"{_word(count)} {noun}{'' if count == 1 else 's'}"


def listed(items: Sequence[str]) -> str:
    """'a, b and c'; a long list is cut and counted."""
    if len(items) > _NAMED + 1:
        items = [*items[:_NAMED], f"{_word(len(items) - _NAMED)} more"]
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def _word(count: int) -> str:
    return _COUNTS[count] if count < len(_COUNTS) else str(count)
