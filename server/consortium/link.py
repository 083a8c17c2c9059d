"""Flower's control interface, as its own command `flwr` speaks it. The one file that knows Flower's internals."""

import hashlib
import os
import ssl
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
from flwr.cli.build import build_fab_from_disk
from flwr.cli.cli_client_interceptor import CliClientHttpInterceptor
from flwr.common.constant import HEARTBEAT_PATIENCE
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from mmfm_core.errors import MmfmError
from server.consortium.settings import Consortium, host_and_port

RUN_DIRECTORY = "run-directory"


@dataclass(frozen=True)
class Node:
    """A site's Flower node, as the link knows it.

    Attributes:
        status: registered (never seen), online, offline, unregistered.
        last_seen: seconds since 1970, or None if it never connected.
    """

    node: int
    status: str
    last_seen: float | None


@dataclass(frozen=True)
class FlowerRun:
    """One submission of a run, as the link knows it.

    Attributes:
        details: why it failed, if Flower knows.
    """

    number: int
    finished: bool
    details: str
    directory: Path


class Link:
    """An open connection to the SuperLink."""

    def __init__(self, client: Any, address: str, log: Path) -> None:
        self._client, self._address, self._log = client, address, log

    def nodes(self) -> dict[int, Node]:
        """Every node that was ever registered, by its number."""
        with self._sentences():
            found = self._client.ListNodes(ListNodesRequest()).nodes_info
        return {each.node_id: Node(each.node_id, each.status, _last_seen(each)) for each in found}

    def register(self, site: str, public_key: bytes) -> int:
        """Let a site's key (PEM) in; returns the number of its node.

        Raises:
            MmfmError: the key was registered before, also if it was revoked since.
        """
        with self._sentences():
            number: int = self._client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=site)).node_id
        return number

    def unregister(self, node: int) -> None:
        """Never let a node's key in again."""
        with self._sentences():
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node))

    def start(self, bundle: Path, run_directory: Path) -> int:
        """Submit a bundle; returns Flower's number of the run."""
        content = build_fab_from_disk(bundle)
        request = StartRunRequest(
            fab=fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {})),
            override_config=user_config_to_proto({RUN_DIRECTORY: str(run_directory)}),
        )
        with self._sentences():
            number: int = self._client.StartRun(request).run_id
        return number

    def stop(self, number: int) -> None:
        """End a run of Flower's."""
        with self._sentences():
            self._client.StopRun(StopRunRequest(run_id=number))

    def runs(self) -> list[FlowerRun]:
        """All submissions, the first one first."""
        with self._sentences():
            found = self._client.ListRuns(ListRunsRequest()).run_dict.values()
        return [
            FlowerRun(
                each.run_id,
                each.status.status == "finished",
                each.status.details,
                Path(each.override_config[RUN_DIRECTORY].string),
            )
            for each in sorted(found, key=lambda each: each.pending_at)
            if RUN_DIRECTORY in each.override_config
        ]

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPStatusError as error:
            known = FlowerError.from_json(error.response.text)
            raise MmfmError(f"Flower's link refuses: {known.message if known else error}") from error
        except (httpx.HTTPError, ValueError) as error:
            raise MmfmError(
                f"{self._address}: the coordinator's link does not answer ({error}); start it with "
                f"'mmfm coordinator up'; {self._log} says what it did"
            ) from error


@contextmanager
def connect(consortium: Consortium) -> Iterator[Link]:
    """A block with an open connection to the coordinator's SuperLink."""
    address = consortium.settings.link
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = host_and_port(address)[0]  # loopback, never through a proxy
    client = ControlHttpClient.from_server_address(
        server_address=address,
        insecure=False,
        root_certificates=consortium.authority.read_bytes(),
        interceptors=[CliClientHttpInterceptor(), RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    )
    try:
        yield Link(client, address, consortium.logs / "superlink.log")
    finally:
        client.close()


def is_healthy(consortium: Consortium) -> bool:
    """Whether the SuperLink answers, over TLS with the certificate that sites will see."""
    context = ssl.create_default_context(cafile=str(consortium.authority))
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(f"https://{consortium.settings.link}/health", timeout=5) as answer:
            healthy: bool = answer.status == 200
            return healthy
    except OSError:
        return False


def _last_seen(node: Any) -> float | None:
    if node.status == "online":  # the link keeps until when it believes so, not since when
        seen: float = node.online_until - HEARTBEAT_PATIENCE * node.heartbeat_interval
        return seen
    if node.last_deactivated_at:
        return datetime.fromisoformat(node.last_deactivated_at).timestamp()
    return None
