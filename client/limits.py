"""What the agent's process may take of the machine: the operating system holds it to that, whatever it is asked."""

import resource
from pathlib import Path

from client import wire
from mmfm_core.config.site import Limits
from mmfm_core.errors import MmfmError

GB = 10**9
ROOM = 0.3  # GB that the threads and the smallest request take beside an agent that waits


def hold(limits: Limits, file: Path) -> None:
    """Hold this process to a site's limits from now on: an allocation beyond them fails, and with it the request.

    Raises:
        MmfmError: what the process has already, without any request, is more.
    """
    if limits.memory is None:
        return
    allowed = int(limits.memory * GB)
    if private() + ROOM * GB > allowed:
        raise MmfmError(
            f"limits.memory: the agent takes {private() / GB:.1f} GB before any request, and one needs room beside "
            f"that; allow {private() / GB + ROOM:.1f} at least",
            str(file),
        )
    # Not the address space (RLIMIT_AS): torch reserves far more of that than it uses.
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))


def largest_message(limits: Limits) -> int:
    """The most bytes of tensors that a message may have: there must be room for it and for what is made of it."""
    return wire.LARGEST_MESSAGE if limits.memory is None else min(wire.LARGEST_MESSAGE, int(limits.memory * GB / 4))


def private() -> int:
    """The private writable memory of this process in bytes, which is what is limited."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return 0
