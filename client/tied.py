"""`python -m client.tied COMMAND ...`: the command, which ends when whoever started it does, however that ended."""

import ctypes
import os
import signal
import sys

SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl; it is kept when another program takes over


def main(command: list[str]) -> None:
    """Become the command."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before it could be asked for
        sys.exit(1)
    os.execvp(command[0], command)  # noqa: S606 (the words of client.running)


if __name__ == "__main__":
    main(sys.argv[1:])
