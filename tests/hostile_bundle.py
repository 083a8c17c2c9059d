"""What a hostile coordinator's code would do in the relay's process. Run as the relay's user; prints what it got.

python hostile_bundle.py SOCKET DOCUMENT AGENT_PID PATH...
"""

import json
import os
import socket as sockets
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import numpy as np

from client import wire
from client.relay import METHOD
from mmfm_core.protocol import Describe, Refusal, RoundReply, RoundRequest, SiteDescription, text_of


def tried(attempt: Callable[[], object]) -> str:
    """What came of it: the kind of the error, or 'done'."""
    try:
        attempt()
    except Exception as error:
        return type(error).__name__
    return "done"


def read(path: Path) -> None:
    if path.is_dir():
        list(path.iterdir())
    else:
        path.read_bytes()


def endless() -> Iterator[bytes]:
    yield (1 << 62).to_bytes(8, "big")
    while True:
        yield bytes(wire.CHUNK)


def never_ending_tensor(document: str) -> Iterator[bytes]:
    """Declares what is allowed, and sends a hundred times as much."""
    whole = b"".join(wire.chunks(RoundRequest(document, 1, {"w": np.zeros(1 << 18, np.float32)})))
    yield from (whole[start : start + wire.CHUNK] for start in range(0, len(whole), wire.CHUNK))
    yield from (bytes(wire.CHUNK) for _ in range(100))


def main(socket: str, document: str, agent: str, *paths: str) -> None:
    found: dict[str, object] = {"read": {path: tried(lambda path=path: read(Path(path))) for path in paths}}  # type: ignore[misc]
    found["kill"] = tried(lambda: os.kill(int(agent), 9))
    found["replace the socket"] = tried(Path(socket).unlink)
    said: dict[str, str] = {}
    channel = grpc.insecure_channel(f"unix:{socket}")
    call = channel.stream_stream(METHOD)

    def ask(name: str, chunks: Iterator[bytes]) -> None:
        try:
            answer = wire.received(call(chunks, timeout=60), SiteDescription, RoundReply, Refusal)
            said[name] = (
                answer.reason if isinstance(answer, Refusal) else f"ANSWERED {type(answer).__name__} {text_of(answer)}"
            )
        except grpc.RpcError as error:
            said[name] = f"gRPC {error.code().name}"

    small = {"w": np.zeros(3, np.float32)}
    ask("another document", wire.chunks(Describe("f" * 64)))
    ask("a path", wire.chunks(Describe(f"../approved/{document}")))
    ask("the hash in capitals", wire.chunks(Describe(document.upper())))
    ask("undeclared tensors", wire.chunks(RoundRequest(document, 1, small)))
    ask(
        "local tensors",
        wire.chunks(RoundRequest(document, 1, {"heads.disease.linear.weight": np.zeros((2, 12), "f4")})),
    )
    ask("no such round", wire.chunks(RoundRequest(document, 10**9, {})))
    ask("five terabytes", iter([declared(document, 5 * 10**12)]))
    ask("an endless head", endless())
    ask("an endless tensor", never_ending_tensor(document))
    ask("garbage", iter([os.urandom(100_000)]))
    ask("another method", iter([b""]))
    other = channel.stream_stream("/mmfm.Agent/Shell")
    said["another method"] = tried(lambda: list(other(iter([b"cat site.yaml"]), timeout=10)))
    for _ in range(50):
        with suppress(OSError), sockets.socket(sockets.AF_UNIX) as raw:
            raw.connect(socket)
            raw.sendall(os.urandom(2000))
    found["said"] = said
    ask("an honest question", wire.chunks(Describe(document)))
    sys.stdout.write(json.dumps(found))


def declared(document: str, size: int) -> bytes:
    """The head of a request that declares so many bytes and sends none."""
    text = json.dumps({"federation": document, "round": 1})
    tensors = [{"name": "w", "dtype": "|u1", "shape": [size]}]
    head = json.dumps({"kind": "RoundRequest", "text": text, "tensors": tensors}).encode()
    return len(head).to_bytes(8, "big") + head


if __name__ == "__main__":
    main(*sys.argv[1:])
