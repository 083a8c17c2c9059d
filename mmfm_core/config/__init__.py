"""What a person writes: the federation's document and the sites' files, loaded strictly."""

from mmfm_core.config.federation import Federation
from mmfm_core.config.loading import load_federation, load_site, load_sites
from mmfm_core.config.site import Site

__all__ = ["Federation", "Site", "load_federation", "load_site", "load_sites"]
