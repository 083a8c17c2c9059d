"""The one file that a site and a coordinator exchange in each direction before a site may connect."""

import json
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ValidationError

from mmfm_core.config.strict import Name, Strict
from mmfm_core.errors import MmfmError
from mmfm_core.storage import write_json


class Request(Strict):
    """From site to coordinator: who asks, and the public half of the key that the site made for itself.

    Attributes:
        public_key: of the site's Flower node, one line of OpenSSH, EC on P-384. The private half never leaves the site.
        versions: of mmfm and flwr at the site; coordinator and sites must share the latter's major.minor.
    """

    format: Literal["mmfm-site-request/1"] = "mmfm-site-request/1"
    site: Name
    public_key: str
    versions: dict[str, str]


class Enrolment(Strict):
    """From coordinator to site: where to connect, and whom to trust there. Nothing in it is secret.

    Attributes:
        address: host:port of the coordinator's Flower link, as the site dials it.
        authority: the consortium's CA certificate, PEM.
        public_key: the key that was registered; a site checks that it is its own.
        issued, expires: seconds since 1970. After `expires` an enrolment that was not used is refused.
    """

    format: Literal["mmfm-enrolment/1"] = "mmfm-enrolment/1"
    consortium: Name
    site: Name
    address: str
    authority: str
    public_key: str
    issued: float
    expires: float


Exchanged = TypeVar("Exchanged", Request, Enrolment)


def write(path: Path, exchanged: Request | Enrolment) -> None:
    """Write either file, whole or not at all."""
    write_json(path, exchanged.model_dump(mode="json"))


def read(path: Path, kind: type[Exchanged]) -> Exchanged:
    """Read either file.

    Raises:
        MmfmError: it cannot be read, or is no such file; the text names the field, not its content.
    """
    what = "a site's request" if kind is Request else "an enrolment"
    try:
        return kind.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise MmfmError(f"{path}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise MmfmError(f"{path}: is not {what}: {where}: {first['msg']}; ask for it again") from error
    except ValueError as error:
        raise MmfmError(f"{path}: is not {what} (not JSON); ask for it again") from error
