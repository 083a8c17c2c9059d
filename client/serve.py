"""The agent's process: it opens the site's directory and serves at the socket until it is told to end."""

import fcntl
import logging
import os
import signal
import threading
from pathlib import Path
from typing import TextIO

from client import limits, logs
from client.place import Place
from client.service import Service, serving
from mmfm_core.data.cache import CACHE, sweep
from mmfm_core.errors import MmfmError
from mmfm_core.process import importing, keep_memory

OVERDUE = 75  # the exit code of a request that took too long: a temporary failure, start again
POLL_SECONDS = 0.2

log = logging.getLogger(__name__)


def serve(place: Place) -> None:
    """Serve, and do not return: SIGTERM and Ctrl-C end the process at once, since all it writes is whole or absent.

    Raises:
        MmfmError: the site's file, its directory or the socket cannot be used.
    """
    os.umask(0o077)
    site = place.site()
    lock = _held(place.directory)
    logs.start(site.name)
    keep_memory()
    sweep(place.directory / CACHE)
    with importing():
        from client.agent import Agent

    agent = Agent.open(place.directory)
    limits.hold(site.limits, place.directory / "site.yaml")
    service = Service(agent, site.limits.seconds, limits.largest_message(site.limits))
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with serving(place.socket, service):
        log.info("the agent listens at %s", place.socket)
        while not stop.wait(POLL_SECONDS) and not service.overdue.is_set():
            pass
    log.info("the agent ends")
    logging.shutdown()
    lock.close()
    # A plain exit would wait for the work that is going on.
    os._exit(OVERDUE if service.overdue.is_set() else 0)


def _held(directory: Path) -> TextIO:
    """The site's directory, held for this process: two agents would answer with one state, each unaware of the other.

    Raises:
        MmfmError: another agent works in it.
    """
    lock = (directory / "agent.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise MmfmError("another agent works in this directory; stop it first", str(directory)) from error
    return lock
