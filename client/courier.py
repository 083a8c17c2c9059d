"""`python -m client.courier PIPE`: runs Flower's program for a message without its two seconds of imports.

For every message Flower's launcher starts `flwr-clientapp` by its name. What it finds first under that name writes the
words of its command line into a pipe; this process, which imported everything once, reads them and forks. The fork is
that program, unchanged. Code that a coordinator sends runs in the fork and leaves nothing behind in this process.
"""

import gc
import os
import shlex
import signal
import sys
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

PROGRAM = "flwr-clientapp"


def stand_in(folder: Path, pipe: Path) -> None:
    """Make the program that is found first under Flower's name, and the pipe that it writes into.

    It waits where nobody reads yet: a courier that was just killed is started again. Where programs in `folder` may
    not be run (a disk mounted so), the next one of that name on the path is Flower's own.
    """
    folder.mkdir()
    os.mkfifo(pipe, 0o600)
    script = folder / PROGRAM
    script.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" > {shlex.quote(str(pipe))}\n')
    script.chmod(0o700)


def main(pipe: Path) -> None:
    """Fork once for every line in the pipe, for ever."""
    (program,) = entry_points(group="console_scripts", name=PROGRAM)
    run = program.load()
    import_module("client.app")  # the bundle names it; a module of that name in a bundle is not looked for any more
    gc.freeze()  # so that the forks' collections do not copy what they share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    with os.fdopen(os.open(pipe, os.O_RDWR)) as lines:  # for writing, too: it does not end when the last writer does
        for line in lines:
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                sys.argv = [PROGRAM, *line.split()]
                sys.exit(run())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
