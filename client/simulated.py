"""The ClientApp of a simulation, whose sites are called in Flower's own process: nothing stands between them."""

import os
from functools import cache
from pathlib import Path

from flwr.app import Context

from client.relay import Ask, relay

SITES_VARIABLE = "MMFM_SITES"
"""Names the folder of the simulated sites where Flower gives a node only its number. Set by whoever starts the process,
never by a message: a coordinator cannot choose which folder is read."""


def site_directories(folder: Path) -> list[Path]:
    """The directories of simulated sites, in the order of their numbers."""
    return sorted(path for path in folder.iterdir() if path.is_dir())


@cache
def _agent(directory: Path) -> Ask:
    from client.agent import Agent  # torch

    return Agent.open(directory, durable=False).answer


def _agent_of(context: Context, _: float) -> Ask:
    return _agent(site_directories(Path(os.environ[SITES_VARIABLE]))[int(context.node_config["partition-id"])])


app = relay(_agent_of)
