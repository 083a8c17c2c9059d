"""`python -m client.courier PIPE`: runs Flower's program for a message without its two seconds of imports.

For every message Flower's launcher starts `flwr-clientapp` by its name. What it finds first under that name, in
`PROGRAMS`, writes the words of its command line into a pipe; this process, which imported everything once, reads them
and forks. The fork is that program, unchanged. Code that a coordinator sends runs there and leaves nothing behind here.
"""

import gc
import os
import signal
import sys
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

PROGRAM = "flwr-clientapp"
PROGRAMS = Path(__file__).with_name("programs")
PIPE = "MMFM_MESSAGES"
"""The variable that names the pipe. A message waits in it where nobody reads yet: a killed courier is started again."""


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
