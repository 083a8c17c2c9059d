"""The ClientApp that Flower loads at a site: it relays to the agent whose socket the node's configuration names."""

from pathlib import Path

from flwr.app import Context

from client.relay import Ask, ask_at, relay
from mmfm_core.errors import MmfmError

SOCKET = "agent-socket"
"""The only thing that a node is told, by the site itself: a coordinator cannot choose whom it asks."""


def _agent_of(context: Context, seconds: float) -> Ask:
    if SOCKET not in context.node_config:
        raise MmfmError(f"this node has no agent: start its SuperNode with --node-config '{SOCKET}=\"...\"'")
    return ask_at(Path(str(context.node_config[SOCKET])), seconds)


app = relay(_agent_of)
