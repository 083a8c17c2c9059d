"""Where a site's files are: the agent's directory, and the folder of what its relay needs to reach the coordinator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmfm_core.errors import MmfmError

if TYPE_CHECKING:  # the commands name places, and must not wait for the schema of documents
    from mmfm_core.config import Site
    from mmfm_core.enrolment import Enrolment

INSTALLED, INSTALLED_SOCKET = Path("/var/lib/mmfm"), Path("/run/mmfm/agent.sock")
"""Where the units of deploy/systemd have a site's directory and its socket."""


@dataclass(frozen=True)
class Place:
    """A site on this machine.

    Attributes:
        directory: the agent's alone: `site.yaml`, approved documents, local state, egress log. See `client.agent`.
        relay: the relay's alone: its key, the coordinator's address and whom to trust there. Nothing about patients.
        socket: between the two.
    """

    directory: Path
    relay: Path
    socket: Path

    @classmethod
    def of(cls, directory: Path, relay: Path | None = None, socket: Path | None = None) -> Place:
        """The places of a site, where they are not named: in its directory, as a trial with one user has them."""
        directory = directory.absolute()
        # A socket's path has a limit on its length: a short one from here may be the only one that fits.
        usual = INSTALLED_SOCKET if directory == INSTALLED else directory / "agent.sock"
        return cls(directory, (relay or directory / "relay").absolute(), socket or usual)

    @property
    def key(self) -> Path:
        """The private key of the site's Flower node."""
        return self.relay / "node.key"

    @property
    def authority(self) -> Path:
        """The consortium's CA certificate."""
        return self.relay / "ca.crt"

    @property
    def enrolment(self) -> Path:
        """The enrolment that was joined with."""
        return self.relay / "enrolment.json"

    def site(self) -> Site:
        """The site's file.

        Raises:
            MmfmError: there is none, or it breaks a rule.
        """
        from mmfm_core.config import load_site

        path = self.directory / "site.yaml"
        if not path.is_file():
            raise MmfmError(
                "there is no site here; name its directory with --directory, or `mmfm site init` it", str(path)
            )
        return load_site(path)

    def enrolled(self) -> Enrolment:
        """Where the coordinator is, and whom to trust there.

        Raises:
            MmfmError: the site did not join, or a file of the relay is gone.
        """
        from mmfm_core import enrolment

        for path in (self.enrolment, self.authority, self.key):
            if not path.is_file():
                raise MmfmError(
                    "is not there; send the request of `mmfm site init`, then `mmfm site join` the answer", str(path)
                )
        return enrolment.read(self.enrolment, enrolment.Enrolment)
