"""The Ray engine: Flower's own simulation, every site a Ray actor's work, on this machine or on a Ray cluster.

It runs in a process of its own: Flower reads its telemetry switch when it is imported, and its simulation leaves the
thread of the ServerApp behind when it is interrupted. RAY_ADDRESS names a cluster, which must see the run directory.
"""

import importlib.util
import logging
import os
import secrets
import sys
import traceback
from pathlib import Path
from typing import Any

from client.simulated import SITES_VARIABLE, site_directories
from mmfm_core.errors import MmfmError
from server.programs import QUIET, begin, check_completed, programs, wait_for
from server.record import Run


def simulate(run_directory: Path) -> None:
    """Run the federation of a run directory over the sites in it.

    Raises:
        MmfmError: Ray is not installed, or the run failed.
    """
    if importlib.util.find_spec("ray") is None:
        raise MmfmError("the engine 'ray' needs Ray; install mmfm[ray]")
    run_directory = run_directory.resolve()
    run = Run.open(run_directory)
    begin(run)
    with programs(run_directory / "ray") as started:
        # Ray's workers import from this process's script folder (not with -m) and current folder (that of the logs): a
        # folder with our ray.py in it would hide Ray from them.
        command: list[str | Path] = [sys.executable, "-P", "-m", __name__, run_directory]
        simulation = started.start("simulation", command, home=run_directory / "ray")
        wait_for(lambda: simulation.ended, alive=[])
    check_completed(run, simulation.log)


def main(run_directory: Path) -> None:
    """The process of the simulation."""
    sites = len(site_directories(run_directory / "sites"))
    here: dict[str, Any] = {}
    if not os.environ.get("RAY_ADDRESS"):
        # An actor per core is no use beyond one per site: each would read the sites' data again.
        here = {"address": "local", "num_cpus": min(sites, os.cpu_count() or 1)}
        # Ray listens on all interfaces, and by default runs the code of whoever asks.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

    import ray  # reads its environment when it is imported
    from flwr.simulation import run_simulation

    from client.simulated import app
    from server.app import serve

    ray.init(
        **here,
        include_dashboard=False,
        logging_level=logging.WARNING,
        runtime_env={"env_vars": QUIET | {SITES_VARIABLE: str(run_directory / "sites")}},
    )
    one_core = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    # Deprecated in Flower 1.41, but the only door that leaves no SuperLink running behind it.
    run_simulation(serve(run_directory), app, sites, backend_config=one_core)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        # A plain exit would wait for the thread of the ServerApp, which may wait for sites until its deadline.
        os._exit(1)
