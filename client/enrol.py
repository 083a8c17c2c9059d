"""Joining a consortium: a site makes its own key, sends a request, and takes what the coordinator answers."""

import os
import re
import time
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import TypeAdapter, ValidationError

from client.place import Place
from mmfm_core import enrolment
from mmfm_core.config import load_site
from mmfm_core.config.strict import Name
from mmfm_core.enrolment import Enrolment, Request
from mmfm_core.errors import MmfmError
from mmfm_core.storage import write_text

VERSIONS = ("mmfm", "flwr")
SKEW_SECONDS = 24 * 60 * 60  # that a coordinator's clock may be ahead
HOST = r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]"


def init(place: Place, name: str) -> Path:
    """Make a site: its directory, its key, `site.yaml` where there is none, and the request, whose path is returned.

    What is there already is kept, the key above all: a second call writes the same request again.

    Raises:
        MmfmError: the name is none, or `site.yaml` has another.
    """
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError as error:
        raise MmfmError(
            f"--name: '{name}' must start with a letter and hold only letters, digits, '_' and '-'"
        ) from error
    for folder in (place.directory, place.relay):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    described = place.directory / "site.yaml"
    if not described.exists():
        template = files("client").joinpath("site.template.yaml").read_text(encoding="utf-8")
        write_text(described, template.replace("NAME", name))
        described.chmod(0o600)
    elif (there := load_site(described).name) != name:
        raise MmfmError(
            f"--name: '{name}' is not the name in it, '{there}'; give that one, or mend the file", str(described)
        )
    if not place.key.exists():
        _write_secret(place.key, new_key())
    request = place.directory / f"{name}.request.json"
    own = Request(site=name, public_key=public_key(place.key), versions={of: version(of) for of in VERSIONS})
    enrolment.write(request, own)
    return request


def join(place: Place, bundle: Path) -> Enrolment:
    """Take an enrolment, so that the relay knows where to connect and whom to trust.

    Raises:
        MmfmError: it is not for this site or key, has expired, was used already, or is older than the one in use.
    """
    name, joined = place.site().name, enrolment.read(bundle, Enrolment)
    if not place.key.is_file():
        raise MmfmError("this site has no key; `mmfm site init` makes one, and a request to send", str(place.key))
    if joined.site != name:
        raise MmfmError(f"site: it is for '{joined.site}', and this site is '{name}'; ask for its own", str(bundle))
    if joined.public_key.split()[:2] != public_key(place.key).split()[:2]:
        raise MmfmError(
            "public_key: the coordinator registered another key than this site's; send it this site's request anew",
            str(bundle),
        )
    if joined.issued > time.time() + SKEW_SECONDS:  # every right one would then be older
        raise MmfmError(
            "issued: that day is yet to come; set the clock that is wrong, here or at the coordinator's, and ask for "
            "the enrolment again",
            str(bundle),
        )
    if place.enrolment.exists():
        present = enrolment.read(place.enrolment, Enrolment)
        if present == joined:
            raise MmfmError("was used at this site already; there is nothing left to do", str(bundle))
        if joined.issued <= present.issued:
            raise MmfmError(
                "issued: it is older than the enrolment that this site uses; ask for a new one", str(bundle)
            )
    if time.time() > joined.expires:
        raise MmfmError(
            f"expires: it was valid until {day(joined.expires)}; ask the coordinator for a new one", str(bundle)
        )
    _check_address(joined.address, bundle)
    _check_authority(joined.authority, bundle)
    write_text(place.authority, joined.authority)
    enrolment.write(place.enrolment, joined)
    return joined


def new_key() -> bytes:
    """A private key as Flower wants it: EC on P-384, OpenSSH's format."""
    key = ec.generate_private_key(ec.SECP384R1())
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )


def public_key(path: Path) -> str:
    """The public half of a key, one line of OpenSSH.

    Raises:
        MmfmError: the file is no such key.
    """
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except (ValueError, TypeError) as error:
        problem = "is not a whole private key; restore it, or remove it and `mmfm site init` and join again"
        raise MmfmError(problem, str(path)) from error
    public = key.public_key()
    return public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def day(moment: float) -> str:
    """A moment (seconds since 1970) for a person."""
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _write_secret(path: Path, secret: bytes) -> None:
    descriptor = os.open(
        path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600
    )  # never readable by others, not for a moment
    with os.fdopen(descriptor, "wb") as file:
        file.write(secret)
        file.flush()
        os.fsync(descriptor)


def _check_address(address: str, bundle: Path) -> None:
    host, _, port = address.rpartition(":")
    if not re.fullmatch(HOST, host) or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise MmfmError(
            f"address: '{address}' is not HOST:PORT; ask the coordinator to enrol this site again", str(bundle)
        )


def _check_authority(pem: str, bundle: Path) -> None:
    try:
        certificates = x509.load_pem_x509_certificates(pem.encode())
    except ValueError as error:
        raise MmfmError("authority: is no certificate (PEM); ask for the enrolment again", str(bundle)) from error
    for certificate in certificates:
        if certificate.not_valid_after_utc.timestamp() < time.time():
            until = day(certificate.not_valid_after_utc.timestamp())
            raise MmfmError(
                f"authority: this certificate was valid until {until}; ask for a new enrolment", str(bundle)
            )
