"""`python -m client.tied PARENT COMMAND ...`: the command, which ends when process PARENT does, however that ended."""

import ctypes
import os
import signal
import sys

SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl; it is kept when another program takes over


def main(parent: int, command: list[str]) -> None:
    """Become the command, unless the parent, who started this, is gone already."""
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(1)
    os.execvp(command[0], command)  # noqa: S606 (the words of client.running)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
