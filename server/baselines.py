"""What a federation must be compared with: each site alone, and the bound of all data in one place.

Both are the same document, changed in a line or two, run by the same code, and without the noise of a private one:
alone nothing leaves a site, and the bound is one of what could be had.
"""

from mmfm_core.config import Federation
from mmfm_core.config.federation import FedAvg


def local_only(federation: Federation) -> Federation:
    """Every site alone, from the same initial model, for as many steps as it would take in all federated rounds."""
    stages = tuple(
        stage.model_copy(
            update={
                "federated": False,
                "rounds": 1,
                "local_steps": stage.rounds * stage.local_steps,
                "interpolate": (1.0,),
                "personal": 0.0,
                "local_first": 0,
            }
        )
        for stage in federation.stages
        if stage.federated
    )
    return federation.model_copy(update={"stages": stages, "privacy": None})


def pooled(federation: Federation, sites: int) -> Federation:
    """All data at one site, for as many steps as all sites take together in the federated rounds."""
    together = min(sites, federation.aggregation.sites_per_round or sites)
    stages = tuple(
        stage.model_copy(update={"local_steps": together * stage.local_steps, "personal": 0.0, "local_first": 0})
        for stage in federation.stages
        if stage.federated
    )
    aggregation = federation.aggregation.model_copy(update={"min_sites": 1, "strategy": FedAvg()})
    everything = federation.parameters.model_copy(update={"shared": ("*",), "local": ()})
    changes = {"stages": stages, "aggregation": aggregation, "parameters": everything, "privacy": None}
    return federation.model_copy(update=changes)
