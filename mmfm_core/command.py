"""The command `mmfm`: gathers the commands that the installed packages declare, and turns errors into sentences."""

import gc
import os
import sys
from importlib.metadata import entry_points

import typer
from rich.console import Console
from rich.markup import escape

from mmfm_core.errors import MmfmError

INTERRUPTED = 130


def build() -> typer.Typer:
    """Gather every command and group of commands declared under the entry-point group `mmfm.commands`."""
    app = typer.Typer(
        name="mmfm",
        help="Train medical multimodal models across hospitals that never share their data.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for entry in sorted(entry_points(group="mmfm.commands"), key=lambda e: e.name):
        command = entry.load()
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=entry.name)
        else:
            app.command(entry.name)(command)
    app.callback()(lambda: None)  # keeps sub-commands even where a package brings only one
    return app


def main() -> None:
    """Run `mmfm`; a mistake the user can mend is one sentence and exit code 1, never a traceback."""
    # No process that may sit beside patient data calls home: Flower's telemetry and update check are off.
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
    stderr = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        build()()
    except MmfmError as error:
        stderr.print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise
        stderr.print(f"[bold red]error:[/] {escape(str(error.filename))}: {error.strerror}; mend that, then try again")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    finally:
        gc.freeze()  # or Python looks for garbage among all that it is about to leave, for a second
