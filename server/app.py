"""The ServerApp: it finds its run directory and hands the grid to the coordinator."""

from pathlib import Path
from time import time

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from mmfm_core.errors import MmfmError
from mmfm_core.protocol import Pack, to_records
from server.coordinator import coordinate
from server.record import Run


def serve(run_directory: Path, pack: Pack = to_records) -> ServerApp:
    """A ServerApp for one run directory."""
    serving = ServerApp()
    serving.main()(lambda grid, _context: coordinate(grid, Run.open(run_directory), pack))
    return serving


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Started by Flower: the run directory is named by the run's configuration."""
    run = Run.open(Path(str(context.run_config["run-directory"])))
    try:
        coordinate(grid, run)
    except MmfmError:
        raise
    except Exception as error:
        cause = f"internal error ({type(error).__name__}); please report it with the log of Flower's SuperExec"
        run.update(status="failed", cause=cause, finished=time())
        raise
