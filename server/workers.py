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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from rich.console import Console

from mmfm_core.config.rounds import rounds_of
from mmfm_core.errors import MmfmError
from server.display import Display, RunProgress
from server.record import Run

GRACE_SECONDS = 15.0
REFRESH_SECONDS = 0.2
ENDED = ("completed", "failed")


@dataclass(frozen=True)
class Job:
    """One run to do: `work` names a function of the run's directory, 'module:function'."""

    title: str
    work: str
    directory: Path


def work(chains: list[list[Job]], console: Console) -> None:
    """Do all jobs, showing their progress; on Ctrl-C stop them so that they can be resumed.

    Raises:
        MmfmError: a job failed; the others were stopped.
    """
    runs = {job.title: Run(job.directory) for chain in chains for job in chain}
    shown = [
        RunProgress(title, run, len(rounds_of(run.federation)), run.facts["expected_sites"])
        for title, run in runs.items()
    ]
    processes: list[BaseProcess] = []
    try:
        processes.extend(start(chain) for chain in chains)  # before the display, which has a thread
        with Display(shown, console) as display:
            while any(process.is_alive() for process in processes) and not any(p.exitcode for p in processes):
                display.refresh()
                time.sleep(REFRESH_SECONDS)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the stopping
        console.print("Stopping ...")
        stop(processes)
        _mark_interrupted(runs.values(), "stopped by Ctrl-C")
        raise
    broken = [chain for chain, process in zip(chains, processes, strict=True) if process.exitcode]
    stop(processes)
    if broken:
        job = next(job for job in broken[0] if runs[job.title].facts["status"] != "completed")
        run = runs[job.title]
        if run.facts["status"] != "failed":
            cause = f"{job.directory}: the process of '{job.title}' was killed; go on with --resume"
            run.update(status="failed", cause=cause, finished=time.time())
        _mark_interrupted(runs.values(), f"stopped because '{job.title}' failed")
        raise MmfmError(run.facts["cause"])


def _mark_interrupted(runs: Iterable[Run], cause: str) -> None:
    for run in runs:
        if run.facts["status"] not in ENDED:
            run.update(status="interrupted", cause=cause, finished=time.time())


def start(jobs: Sequence[Job]) -> BaseProcess:
    """Start a new process that does the jobs one after the other; how each ends is written into its `run.json`.

    It is forked: a command that only reads documents has imported what a worker needs, and computed nothing.
    """
    for job in jobs:
        pkgutil.resolve_name(job.work)  # imported here once, for all that are started
    # A daemon, so that whatever ends the command early ends its workers too. Ctrl-C reaches a whole terminal, and only
    # the command is to answer it: a worker inherits that it does not listen, from its first moment.
    process = multiprocessing.get_context("fork").Process(target=_main, args=(jobs,), daemon=True)
    listening = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    process.start()
    signal.pthread_sigmask(signal.SIG_SETMASK, listening)
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for job in jobs:
        _do(job)


def _do(job: Job) -> None:
    run, log = Run.open(job.directory), (job.directory / "worker.log").open("a")
    os.dup2(log.fileno(), sys.stdout.fileno())
    os.dup2(log.fileno(), sys.stderr.fileno())
    run.update(status="starting", cause=None)
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
