"""The bound: all sites' data in one place, which only a simulation can have."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from client import gates
from client.agent import Agent
from client.simulated import site_directories
from mmfm_core.config import load_site
from mmfm_core.config.model import Model
from mmfm_core.config.rounds import rounds_of
from mmfm_core.config.site import Release
from mmfm_core.data.cache import CACHE
from mmfm_core.data.dataset import Dataset, concatenate, load_dataset
from mmfm_core.errors import MmfmError
from mmfm_core.protocol import Describe, RoundReply, RoundRequest, SiteDescription
from server.engines.in_process import simulate_with
from server.record import Run
from server.strategy import Strategy

EXACT = Release(min_count=1)  # nothing leaves: there is no such site


def simulate(run_directory: Path) -> None:
    """Train on all sites' studies as if they were one site's, then measure the model on each site's own patients.

    Raises:
        MmfmError: a site's data cannot be used, or the run failed.
    """
    run = Run.open(run_directory)
    folders = site_directories(run_directory / "sites")
    first = load_site(folders[0] / "site.yaml")
    gates.approve(run_directory / "pooled" / "approved", run.federation)
    for shared in ("artifacts", CACHE):  # the sites link to one place already
        link = run_directory / "pooled" / shared
        if (folders[0] / shared).exists() and not link.exists():
            link.symlink_to((folders[0] / shared).resolve())
    simulate_with(
        run_directory,
        [
            Agent(
                run_directory / "pooled",
                "pooled",
                EXACT,
                partial(_read_all, folders, run_directory / "artifacts"),
                durable=False,
                device=first.device,  # the sites of a simulation share these
                precision=first.precision,
            )
        ],
    )
    run.update(status="measuring")  # or a run that is killed now would never be measured
    checkpoint = run.checkpoint()
    assert checkpoint is not None
    strategy = Strategy(run.federation, checkpoint[1])
    for folder in folders:
        _measure(Agent.open(folder, durable=False), run, strategy)
    run.update(status="completed", finished=time.time())


def _measure(agent: Agent, run: Run, strategy: Strategy) -> None:
    document, last = run.facts["federation"], rounds_of(run.federation)[-1]
    site = agent.answer(Describe(document))
    reply = site
    if isinstance(site, SiteDescription):
        tensors = {name: strategy.shared[name] for name in strategy.tensors_for(site, last)}
        reply = agent.answer(RoundRequest(document, last.number, tensors))
    if not isinstance(reply, RoundReply):
        raise MmfmError(f"site '{agent.name}' could not measure the pooled model: {reply}")


def _read_all(folders: Sequence[Path], artifacts: Path, model: Model) -> Dataset:
    sites = [load_site(folder / "site.yaml") for folder in folders]
    return concatenate([load_dataset(site, model, artifacts) for site in sites], model, artifacts)
