"""What Flower is given to start a run: a bundle without code, and values in files."""

import json
from pathlib import Path

from mmfm_core.storage import write_text
from server.record import Run

BUNDLE = """\
[project]
name = "mmfm"
version = "1.0.0"
description = "A federation's document; the code is installed where it runs."

[tool.flwr.app]
publisher = "mmfm"

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
run-directory = ""
"""


def write_bundle(folder: Path, run: Run) -> None:
    """What Flower sends to every site: the document and the names of two installed modules, and no code."""
    write_text(folder / "pyproject.toml", BUNDLE)
    write_text(folder / "federation.yaml", (run.directory / "federation.yaml").read_text())


def write_values(path: Path, values: dict[str, str]) -> None:
    """A TOML file of strings; on Flower's command lines a path with a quote or a blank would be torn apart."""
    write_text(path, "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items()))
