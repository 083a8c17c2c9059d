"""Long work in processes of its own, so that the command stays responsive and Ctrl-C leaves nothing half-done.

A worker may be killed at any moment: what it writes is whole or absent, and a resumed run repeats the round it was in.
"""

import logging
import multiprocessing
import os
import pkgutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from mmfm_core.errors import MmfmError
from server.record import Run

GRACE_SECONDS = 15.0


@dataclass(frozen=True)
class Job:
    """One run to do: `work` names a function of the run's directory, 'module:function'."""

    title: str
    work: str
    directory: Path


def start(jobs: Sequence[Job]) -> BaseProcess:
    """Start a new process that does the jobs one after the other; how each ends is written into its `run.json`."""
    process = multiprocessing.get_context("spawn").Process(target=_main, args=(jobs,))
    process.start()
    return process


def stop(processes: Sequence[BaseProcess]) -> None:
    """Ask workers to end, and make them after a grace period."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(GRACE_SECONDS)
        process.kill()
        process.join()


def _main(jobs: Sequence[Job]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; only the command answers it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for job in jobs:
        _do(job)


def _do(job: Job) -> None:
    run, log = Run.open(job.directory), (job.directory / "worker.log").open("a")
    os.dup2(log.fileno(), sys.stdout.fileno())
    os.dup2(log.fileno(), sys.stderr.fileno())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", force=True)
    try:
        pkgutil.resolve_name(job.work)(job.directory)
    except MmfmError as error:
        run.update(status="failed", cause=str(error), finished=time.time())
        sys.exit(1)
    except Exception as error:
        logging.exception("internal error")
        cause = f"internal error ({type(error).__name__}); please report it with {log.name}"
        run.update(status="failed", cause=cause, finished=time.time())
        sys.exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)
