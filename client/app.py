"""The ClientApp: it relays every message to the site's agent and the answer back. It knows no data and no model."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from mmfm_core.errors import MmfmError
from mmfm_core.protocol import Describe, Refusal, RoundReply, RoundRequest, SiteDescription, from_records, to_records

Question = Describe | RoundRequest
Answer = SiteDescription | RoundReply | Refusal
Ask = Callable[[Question], Answer]

SITES_VARIABLE = "MMFM_SITES"
"""Names the folder of the simulated sites where Flower gives a node only its number. Set by whoever starts the process,
never by a message: a coordinator cannot choose which folder is read."""


def relay(agent_of: Callable[[Context], Ask]) -> ClientApp:
    """A ClientApp that passes each message to the agent of its node."""
    app = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        try:
            question = from_records(message.content, Describe, RoundRequest)
            assert isinstance(question, Describe | RoundRequest)
            answer = agent_of(context)(question)
        except MmfmError as error:
            answer = Refusal(site="", reason=str(error))
        return Message(to_records(answer), reply_to=message)

    app.query()(handle)
    app.train()(handle)
    return app


def site_directory(context: Context) -> Path:
    """The directory of the node's site: named by its own configuration, or the n-th simulated site."""
    if "site-directory" in context.node_config:
        return Path(str(context.node_config["site-directory"]))
    if SITES_VARIABLE not in os.environ:
        raise MmfmError("this node has no site: start its SuperNode with --node-config 'site-directory=\"...\"'")
    return site_directories(Path(os.environ[SITES_VARIABLE]))[int(context.node_config["partition-id"])]


def site_directories(folder: Path) -> list[Path]:
    """The directories of simulated sites, in the order of their numbers."""
    return sorted(path for path in folder.iterdir() if path.is_dir())


@cache
def _agent(directory: Path) -> Ask:
    from client.agent import Agent  # torch, only where the agent lives in this process

    return Agent.open(directory).answer


app = relay(lambda context: _agent(site_directory(context)))
