"""Which sites are enrolled, by the node that Flower gave their key: who is asked, and by which name a reply counts."""

import fcntl
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mmfm_core.errors import MmfmError
from mmfm_core.storage import write_json


@dataclass(frozen=True)
class Registration:
    """One key of one site.

    Attributes:
        node: Flower's number of the node that proves to have the key.
        enrolled, revoked: seconds since 1970.
    """

    site: str
    node: int
    public_key: str
    enrolled: float
    revoked: float | None = None


class Registry:
    """The file of all registrations, also of those that were revoked."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def all(self) -> list[Registration]:
        """In the order in which they were made.

        Raises:
            MmfmError: the file is damaged.
        """
        try:
            return [Registration(**each) for each in json.loads(self.path.read_text())]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError) as error:
            raise MmfmError(f"{self.path}: cannot be read; restore it from the backup") from error

    def active(self) -> dict[str, Registration]:
        """By site, those that were not revoked."""
        return {each.site: each for each in self.all() if each.revoked is None}

    def sites(self) -> dict[int, str]:
        """The name of every site that may take part, by its node."""
        return {each.node: site for site, each in self.active().items()}

    def add(self, registration: Registration) -> None:
        """Keep a registration; one of the same site that stood until now is revoked."""
        self._change(lambda known: [*_revoked(known, registration.site), registration])

    def revoke(self, site: str) -> None:
        """Keep that a site was revoked."""
        self._change(lambda known: _revoked(known, site))

    def _change(self, change: Callable[[list[Registration]], list[Registration]]) -> None:
        with self.path.with_name(f".{self.path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            write_json(self.path, [asdict(each) for each in change(self.all())])


def _revoked(known: list[Registration], site: str) -> list[Registration]:
    return [
        replace(each, revoked=time.time()) if each.site == site and each.revoked is None else each for each in known
    ]
