"""`mmfm coordinator enrol` and `revoke`: which site may connect."""

import time
from importlib.metadata import version
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mmfm_core.enrolment import Enrolment, Request, read, write
from mmfm_core.errors import MmfmError
from server.consortium.link import connect
from server.consortium.settings import Consortium
from server.registry import Registration, Registry
from server.sites import FEDERATION

DAY = 86400.0


def registry_of(consortium: Consortium) -> Registry:
    """The sites of a consortium."""
    return Registry(consortium.state / "sites.json")


def enrol(consortium: Consortium, request_file: Path, out: Path, *, replace: bool) -> Enrolment:
    """Let a site in, and write the file that it joins with.

    Raises:
        MmfmError: the request is none or of another version of Flower, its key is no good or known already, or the site
            is enrolled and `replace` is not asked for.
    """
    request = read(request_file, Request)
    if request.site == FEDERATION:
        raise MmfmError(f"{request_file}: site: '{FEDERATION}' stands for all sites together; the site needs another")
    _check_versions(request_file, request)
    key = _pem_of(request_file, request.public_key)
    registry = registry_of(consortium)
    public_key = " ".join(request.public_key.split()[:2])  # without its comment
    former = registry.active().get(request.site)
    if former and not replace:
        raise MmfmError(
            f"{request_file}: site '{request.site}' is enrolled already, since {_day(former.enrolled)}; if this "
            "request really is from it (ask by telephone), give --replace, which locks its former key out"
        )
    other = next((each for each in registry.all() if each.public_key == public_key and each != former), None)
    if other:
        state = "was revoked" if other.revoked else f"is in use by site '{other.site}'"
        raise MmfmError(
            f"{request_file}: public_key: this key {state}, and a key is registered only once; the site makes "
            "another with 'mmfm site init'"
        )
    with connect(consortium) as link:
        # The same key again is only a new file, unless the link's database was lost and does not know it any more.
        if former is None or former.public_key != public_key or former.node not in link.nodes():
            node = link.register(request.site, key)
            registry.add(Registration(request.site, node, public_key, time.time()))
            if former and former.public_key != public_key:
                link.unregister(former.node)
    enrolment = Enrolment(
        consortium=consortium.settings.name,
        site=request.site,
        address=consortium.settings.address,
        authority=consortium.authority.read_text(),
        public_key=request.public_key,
        issued=time.time(),
        expires=time.time() + consortium.settings.enrolment_days * DAY,
    )
    write(out, enrolment)
    return enrolment


def revoke(consortium: Consortium, site: str) -> None:
    """Lock a site out, from now on and for good: its key is never accepted again.

    Raises:
        MmfmError: no site of that name is enrolled.
    """
    registry = registry_of(consortium)
    active = registry.active()
    if site not in active:
        raise MmfmError(f"'{site}' is not enrolled; enrolled are: {', '.join(sorted(active)) or 'none'}")
    registry.revoke(site)  # first: the next round does without it, whether or not the link can be reached
    with connect(consortium) as link:
        link.unregister(active[site].node)


def _check_versions(path: Path, request: Request) -> None:
    ours, theirs = version("flwr"), request.versions.get("flwr", "none")
    if ours.split(".")[:2] != theirs.split(".")[:2]:
        raise MmfmError(
            f"{path}: versions.flwr: the site has {theirs} and this coordinator {ours}, which do not understand each "
            "other; install the same mmfm at both"
        )


def _pem_of(path: Path, public_key: str) -> bytes:
    try:
        key = serialization.load_ssh_public_key(public_key.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise MmfmError(f"{path}: public_key: is not a key; ask the site for its request again") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise MmfmError(f"{path}: public_key: is not an EC key on P-384; the site makes one with 'mmfm site init'")
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))
