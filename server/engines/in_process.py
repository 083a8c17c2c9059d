"""The default engine: both apps in one process, or with workers beside it; no network, and one thread in each."""

import itertools
import secrets
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run as FlowerRun
from flwr.supercore.task_identity import TaskIdentity

from client.agent import Agent
from client.relay import relay
from client.simulated import site_directories
from mmfm_core.protocol import Unpacked
from server.app import serve
from server.engines.crew import Crew, crew
from server.engines.hospitals import Hospitals, shared_models
from server.record import Run

CLIENT_APP_RAISED_EXCEPTION = 2  # the code that Flower's own client process answers with


class InProcessGrid(Grid):
    """A Flower grid whose nodes are calls of a ClientApp in this process, each made when its reply is asked for.

    With a `crew` they are made by its workers, and replies are handed over in the same order: the result is the same.
    """

    def __init__(self, client_app: ClientApp, nodes: int) -> None:
        self._client_app = client_app
        self._run = FlowerRun.create_empty(run_id=secrets.randbits(63))
        # Flower keeps who is speaking in a process-wide place; a Message cannot be made without it.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, self._run.run_id, 1
        self._contexts = {
            node: Context(
                run_id=self._run.run_id,
                node_id=node,
                state=RecordDict(),
                run_config={},
                node_config={"partition-id": node - 1, "num-partitions": nodes},
            )
            for node in range(1, nodes + 1)
        }
        self._numbers = itertools.count(1)
        self._waiting: dict[str, Message] = {}
        self.crew: Crew[Message, Message] | None = None

    def set_run(self, run: FlowerRun) -> None:
        """Flower's contract."""
        self._run = run

    @property
    def run(self) -> FlowerRun:
        """Flower's contract."""
        return self._run

    def get_node_ids(self) -> Iterable[int]:
        """All nodes; they never leave."""
        return list(self._contexts)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Flower's contract, for code of before Flower 1.13."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages."""
        identifiers = []
        for message in messages:
            identifier = f"message-{next(self._numbers)}"
            message.metadata.__dict__["_message_id"] = identifier
            self._waiting[identifier] = message
            if self.crew:
                self.crew.ask(identifier, message)
            identifiers.append(identifier)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Work on the first of the messages and hand over its reply, so that one reply at a time is in memory."""
        for identifier in message_ids:
            message = self._waiting.pop(identifier, None)
            if message is not None:
                yield self.crew.take(identifier) if self.crew else self.reply(message)
                return

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """All replies at once."""
        identifiers = list(self.push_messages(messages))
        return [reply for identifier in identifiers for reply in self.pull_messages([identifier])]

    def reply(self, message: Message) -> Message:
        """What the ClientApp answers."""
        try:
            return self._client_app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:  # the contract of Flower's own client process
            return Message(Error(CLIENT_APP_RAISED_EXCEPTION, type(error).__name__), reply_to=message)


def simulate(run_directory: Path) -> None:
    """Run the federation of a run directory over the sites in it, with as many workers as its facts say."""
    build = shared_models()
    folders = site_directories(run_directory / "sites")
    simulate_with(run_directory, [Agent.open(folder, durable=False, build=build) for folder in folders])


def simulate_with(run_directory: Path, agents: list[Agent]) -> None:
    """Run the federation of a run directory over `agents`, every one of which must be able to take part.

    Raises:
        MmfmError: a site's data cannot be used; nothing was trained. Or the run failed.
    """
    run, hospitals = Run.open(run_directory), Hospitals(agents)
    hospitals.participate(run.facts["federation"])
    asks = [hospitals.ask(index) for index in range(len(hospitals))]
    # What is packed, and how, is the business of messages that travel: other engines, and the tests, see to that.
    app = relay(lambda context, _: asks[int(context.node_config["partition-id"])], Unpacked)
    grid = InProcessGrid(app, len(agents))
    context = Context(run_id=grid.run.run_id, node_id=0, node_config={}, state=RecordDict(), run_config={})
    workers = min(run.facts.get("workers", 1), len(agents))
    with ExitStack() as stack:
        if workers > 1:
            grid.crew = stack.enter_context(crew(grid.reply, workers))
        serve(run_directory, Unpacked)(grid, context)
