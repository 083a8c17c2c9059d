"""Ask many sites one question each, and hand over every answer as it arrives."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from mmfm_core.errors import MmfmError
from mmfm_core.protocol import Refusal, RoundReply, SiteDescription, from_records

UNASKED = -1
POLL_SECONDS = 0.2  # Flower's own send_and_receive looks every 3 s, and hands over nothing before the last reply
LONGEST_POLL, POLL_SHARE = 2.0, 0.02  # each look is a request to the link and its database: fewer in long rounds


@dataclass(frozen=True)
class Answer:
    """What came from one node: a message, or the reason why none did."""

    node: int
    message: SiteDescription | RoundReply | Refusal | None
    problem: str | None = None


def ask(
    grid: Grid,
    nodes: Iterable[int],
    question: Callable[[int], RecordDict],
    kind: str,
    deadline: float | Callable[[int], float],
) -> Iterator[Answer]:
    """Send each node its question and yield each answer on arrival; nodes silent after `deadline` seconds come last.

    A question lives no longer than its deadline, so a node that was busy does not work on what nobody waits for.
    Questions are built one at a time, and an answer is not kept: memory does not grow with the number of sites.

    Args:
        deadline: seconds, for all nodes or for each one, from when its question is about to be sent: a busy machine
            may take long over that.
    """
    waiting: dict[str, int] = {}
    seconds: dict[int, float] = {}
    due: dict[int, float] = {}
    asked = time.monotonic()
    for node in nodes:
        seconds[node] = deadline(node) if callable(deadline) else deadline
        due[node] = time.monotonic() + seconds[node]
        message = Message(question(node), dst_node_id=node, message_type=kind, ttl=seconds[node])
        (identifier,) = list(grid.push_messages([message])) or [None]
        if identifier is None:
            yield Answer(node, None, "Flower could not send it the question")
        else:
            waiting[identifier] = node
    while waiting:
        arrived = False
        for reply in grid.pull_messages(list(waiting)):
            node = waiting.pop(reply.metadata.reply_to_message_id, UNASKED)
            if node != UNASKED:
                arrived = True
                yield _answer(node, reply)
        # What has arrived is taken, however late: in one process, a site only begins when the one before it is done.
        if not arrived:
            now = time.monotonic()
            if all(now > due[node] for node in waiting.values()):
                break
            time.sleep(max(POLL_SECONDS, min(LONGEST_POLL, POLL_SHARE * (now - asked))))
    for node in waiting.values():
        yield Answer(node, None, f"no answer within {seconds[node]:.3g} s")


def _answer(node: int, reply: Message) -> Answer:
    if reply.has_error():
        return Answer(node, None, f"Flower reports: {reply.error.reason}")
    try:
        message = from_records(reply.content, SiteDescription, RoundReply, Refusal)
        assert isinstance(message, SiteDescription | RoundReply | Refusal)
        return Answer(node, message)
    except MmfmError as error:
        return Answer(node, None, str(error))
