"""Predictions on the test split, kept at the site as a table its own people can read."""

import io
from pathlib import Path

import pandas as pd

from mmfm_core.data.dataset import Dataset
from mmfm_core.storage import write_text
from mmfm_core.training.evaluation import Predictions


def write_predictions(directory: Path, state: str, predictions: Predictions, dataset: Dataset) -> None:
    """Write `predictions/<head>-<state>.csv`: study, patient, target and one probability per class."""
    frame = pd.DataFrame(
        {
            "study": [dataset.studies[row].study for row in predictions.rows],
            "patient": [dataset.studies[row].patient for row in predictions.rows],
            "target": predictions.targets.tolist(),
        }
        | {f"p{label}": column.tolist() for label, column in enumerate(predictions.probabilities.T)}
    )
    text = io.StringIO()
    frame.to_csv(text, index=False)
    write_text(directory / "predictions" / f"{predictions.head}-{state}.csv", text.getvalue())
