"""Predictions on the test split, kept at the site as a table its own people can read."""

from pathlib import Path

from mmfm_core.storage import write_text
from mmfm_core.training.evaluation import Predictions


def write_predictions(directory: Path, state: str, predictions: Predictions) -> None:
    """Write `predictions/<head>-<state>.csv`: study, patient, target and what the head made of it."""
    text = predictions.table.to_csv(index=False)
    write_text(directory / "predictions" / f"{predictions.head}-{state}.csv", text)
