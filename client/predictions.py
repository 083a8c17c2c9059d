"""Predictions on the test split, kept at the site as a table its own people can read."""

from pathlib import Path

from mmfm_core.storage import write_text
from mmfm_core.training.evaluation import Predictions


def write_predictions(directory: Path, document: str, state: str, predictions: Predictions) -> None:
    """Write study, patient, target and what a head made of it; see `path_of`."""
    write_text(path_of(directory, document, predictions.head, state), predictions.table.to_csv(index=False))


def path_of(directory: Path, document: str, head: str, state: str) -> Path:
    """Where a site has the predictions of a document's head: heads of two federations may have one name."""
    return directory / "predictions" / document[:16] / f"{head}-{state}.csv"
