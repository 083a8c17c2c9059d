"""The network's side of the boundary: each message goes to the agent behind a socket, and its answer back.

It knows no data and no model, and imports neither torch nor the agent. Whatever is wrong becomes a refusal in bounded
time, so that the coordinator is never left waiting.
"""

from collections.abc import Callable
from pathlib import Path

import grpc
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client import wire
from mmfm_core.errors import MmfmError
from mmfm_core.protocol import (
    Describe,
    Pack,
    Refusal,
    RoundReply,
    RoundRequest,
    SiteDescription,
    from_records,
    to_records,
)

Question = Describe | RoundRequest
Answer = SiteDescription | RoundReply | Refusal
Ask = Callable[[Question], Answer]

METHOD = "/mmfm.Agent/Ask"
CONNECT_SECONDS = 30.0  # an agent that was just started again is still importing torch
LONGEST_PATH = 107  # bytes, of a Unix socket

OPTIONS = [
    ("grpc.max_receive_message_length", 2 * wire.CHUNK),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A machine that suspended the agent, or lost it without a word, is noticed within a minute.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 40_000),
    ("grpc.http2.max_pings_without_data", 0),
]


def relay(ask_of: Callable[[Context, float], Ask], pack: Pack = to_records) -> ClientApp:
    """A ClientApp that passes each message to the agent of its node, and waits no longer than the message lives."""
    app = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        try:
            question = from_records(message.content, Describe, RoundRequest)
            assert isinstance(question, Describe | RoundRequest)
            answer = ask_of(context, message.metadata.ttl)(question)
        except MmfmError as error:
            answer = Refusal(site="", reason=error.told)
        return Message(pack(answer), reply_to=message)

    app.query()(handle)
    app.train()(handle)
    return app


def ask_at(socket: Path, seconds: float) -> Ask:
    """What asks the agent behind a socket; it answers within `seconds`, or is given up.

    The returned function raises:
        MmfmError: nobody listens there, the agent ended while it worked, or what came is no answer.
    """

    def ask(question: Question) -> Answer:
        with grpc.insecure_channel(f"unix:{socket}", OPTIONS) as channel:
            try:
                grpc.channel_ready_future(channel).result(min(CONNECT_SECONDS, seconds))
            except grpc.FutureTimeoutError as error:
                raise MmfmError(
                    "the site's agent does not answer at its socket; the site starts it with `mmfm site run`, and the "
                    "log of that says why it ended"
                ) from error
            call = channel.stream_stream(METHOD)(wire.chunks(question), timeout=seconds)
            try:
                answer = wire.received(call, SiteDescription, RoundReply, Refusal)
            except grpc.RpcError as error:
                raise MmfmError(_why(error.code(), seconds)) from error
        assert isinstance(answer, SiteDescription | RoundReply | Refusal)
        return answer

    return ask


def _why(code: grpc.StatusCode, seconds: float) -> str:
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"the site's agent did not answer within {seconds:.0f} s, as long as the message lived"
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return "the site's agent has other requests waiting; ask again later"
    return f"the site's agent ended while it worked on this ({code.name}); its own log says why"
