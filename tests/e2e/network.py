"""A coordinator and sites in network namespaces: each its own address, joined by a bridge at the coordinator."""

import asyncio
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

COORDINATOR = "10.77.0.1"


def obstacle() -> str | None:
    """Why there can be no such network here; None where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip"):
        return "needs iproute2's ip"
    if not shutil.which("nginx"):
        return "needs nginx, the coordinator's door"
    if subprocess.run(["unshare", "--net", "true"], check=False, capture_output=True).returncode:
        return "network namespaces are not permitted here"
    return None


class Network:
    """Namespaces `mmfm<pid>c` and `mmfm<pid>s<number>`; needs root."""

    def __init__(self, sites: int) -> None:
        self._prefix, self._sites = f"mmfm{os.getpid()}", sites

    def inside(self, site: int | None = None) -> list[str]:
        """What a command is run through to be inside the coordinator's namespace, or a site's."""
        return ["ip", "netns", "exec", self._name(site)]

    def build(self) -> None:
        """Make it."""
        hub = self._name(None)
        _ip("netns", "add", hub)
        for words in (
            ("link", "set", "lo", "up"),
            ("link", "add", "hub", "type", "bridge"),
            ("link", "set", "hub", "up"),
            ("addr", "add", f"{COORDINATOR}/24", "dev", "hub"),
        ):
            _ip("-n", hub, *words)
        for site in range(self._sites):
            name = self._name(site)
            _ip("netns", "add", name)
            _ip("-n", hub, "link", "add", f"to{site}", "type", "veth", "peer", "name", "line", "netns", name)
            for where, words in (
                (hub, ("link", "set", f"to{site}", "master", "hub")),
                (hub, ("link", "set", f"to{site}", "up")),
                (name, ("link", "set", "lo", "up")),
                (name, ("addr", "add", f"10.77.0.{11 + site}/24", "dev", "line")),
                (name, ("link", "set", "line", "up")),
            ):
                _ip("-n", where, *words)

    def remove(self) -> None:
        """Remove it; interfaces go with their namespaces."""
        for site in (*range(self._sites), None):
            subprocess.run(["ip", "netns", "del", self._name(site)], check=False, stderr=subprocess.DEVNULL)

    def cut(self, site: int) -> None:
        """Pull a site's plug: packets go nowhere, connections are told nothing."""
        _ip("-n", self._name(None), "link", "set", f"to{site}", "down")

    def join(self, site: int) -> None:
        """Plug it in again."""
        _ip("-n", self._name(None), "link", "set", f"to{site}", "up")

    @contextmanager
    def bad_line(self, site: int, port: int, delay: float, loss: float) -> Iterator[str]:
        """A relay inside the site's namespace through which the coordinator is slow and connections break.

        Args:
            delay: seconds, each way. loss: the share of chunks at which a connection breaks.

        Yields:
            The address to dial instead of the coordinator's.
        """
        command = [*self.inside(site), sys.executable, __file__, str(port), str(delay), str(loss)]
        with subprocess.Popen(command) as relay:
            try:
                yield f"127.0.0.1:{port}"
            finally:
                relay.terminate()

    def _name(self, site: int | None) -> str:
        return f"{self._prefix}c" if site is None else f"{self._prefix}s{site}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


async def _serve_bad_line(port: int, delay: float, loss: float) -> None:
    chance = random.Random(0)  # noqa: S311 (a test's dice)

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                if chance.random() < loss:
                    break
                await asyncio.sleep(delay)
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        finally:
            sink.close()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, sink = await asyncio.open_connection(COORDINATOR, port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(pump(reader, sink), pump(there, writer))

    server = await asyncio.start_server(handle, "127.0.0.1", port)
    await server.serve_forever()


def main(arguments: Sequence[str]) -> None:
    """The relay's process."""
    asyncio.run(_serve_bad_line(int(arguments[0]), float(arguments[1]), float(arguments[2])))


if __name__ == "__main__":
    main(sys.argv[1:])
