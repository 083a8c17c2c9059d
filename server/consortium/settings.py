"""A coordinator's directory, and what `coordinator.yaml` in it says."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import Field, PositiveFloat, model_validator

from mmfm_core.config.loading import load_document
from mmfm_core.config.strict import Name, Strict
from mmfm_core.errors import MmfmError

DEFAULT_PORT = 8443
SETTINGS = "coordinator.yaml"


class Settings(Strict):
    """The words of `coordinator.yaml`.

    Attributes:
        address: host:port as the sites dial it; the server's certificate names the host.
        listen: host:port on which the door (nginx) listens for the sites.
        link: host:port of Flower's SuperLink. Whoever reaches it may start and stop runs: loopback only.
        monitor: host:port of /health and /metrics.
        door: whether nginx stands before the link and lets sites through to what they need, and to nothing else.
            False only where no other machine can connect, for a trial on one.
        enrolment_days: after how many days an enrolment that was not used is refused by the site.
    """

    name: Name
    address: str
    listen: str
    link: str = "127.0.0.1:8000"
    monitor: str = "127.0.0.1:8001"
    door: bool = True
    enrolment_days: PositiveFloat = Field(default=14.0)

    @model_validator(mode="after")
    def _check_places(self) -> Self:
        for field in ("address", "listen", "link", "monitor"):
            try:
                host_and_port(getattr(self, field))
            except MmfmError as error:
                raise ValueError(f"{field}: {error}") from error
        for field in ("link", "monitor"):
            if not is_loopback(host_and_port(getattr(self, field))[0]):
                raise ValueError(
                    f"{field}: must be on the loopback interface (127.0.0.1:PORT), because whoever reaches it is obeyed"
                )
        if not self.door and self.address != self.link:
            raise ValueError("door: can be left out only where sites dial the loopback interface, address = link")
        return self


@dataclass(frozen=True)
class Consortium:
    """A coordinator's directory: who may read it may act as the coordinator, so it belongs to one user, mode 0700."""

    directory: Path
    settings: Settings

    @classmethod
    def open(cls, directory: Path) -> "Consortium":
        """Read a directory that `mmfm coordinator init` made.

        Raises:
            MmfmError: it is none, or its settings break a rule.
        """
        directory = directory.resolve()
        if not (directory / SETTINGS).is_file():
            raise MmfmError(
                f"{directory / SETTINGS}: there is no coordinator here; name its directory with --directory, or make "
                "one with 'mmfm coordinator init'"
            )
        return cls(directory, load_document(Settings, directory / SETTINGS))

    @property
    def keys(self) -> Path:
        """The folder of all that is secret: `ca.key`, `server.key`, `superexec.secret`."""
        return self.directory / "keys"

    @property
    def secret(self) -> Path:
        """What the SuperExec proves itself with to the SuperLink."""
        return self.keys / "superexec.secret"

    @property
    def authority(self) -> Path:
        """The CA's certificate, which every site gets."""
        return self.directory / "certificates" / "ca.crt"

    @property
    def certificate(self) -> Path:
        """The server's certificate."""
        return self.directory / "certificates" / "server.crt"

    @property
    def state(self) -> Path:
        """The folder of what must survive: Flower's database and who is enrolled."""
        return self.directory / "state"

    @property
    def database(self) -> Path:
        """Flower's database."""
        return self.state / "superlink.db"

    @property
    def flower(self) -> Path:
        """Flower's home, with the `config.toml` of its own command `flwr`."""
        return self.directory / "flower"

    @property
    def logs(self) -> Path:
        """One file for each program; that of the monitor is what all runs told, in JSON lines."""
        return self.directory / "logs"

    @property
    def runs(self) -> Path:
        """Where runs are put unless they are given another place."""
        return self.directory / "runs"


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of host:port; an IPv6 host stands in brackets.

    Raises:
        MmfmError: it is not of that form.
    """
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16 or any(c in host for c in " /@"):
        raise MmfmError(f"'{address}' is not HOST:PORT, for example coordinator.example.org:{DEFAULT_PORT}")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine as only itself can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
