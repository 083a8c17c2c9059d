"""Whether a site's relay would reach its coordinator: name, proxy, TLS, and how far the clocks are apart."""

import ssl
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime

import httpx
from cryptography import x509

from client.checks import Finding
from client.enrol import day, public_key
from client.place import Place
from mmfm_core.errors import MmfmError

SECONDS = 10.0
AHEAD_SECONDS, BEHIND_SECONDS = 5.0, 300.0  # what Flower's link tolerates in the time that a node signs
SOON_SECONDS = 30 * 86400.0


def check_relay(place: Place) -> Iterator[Finding]:
    """What the relay needs, from its files to an answer of the coordinator's."""
    try:
        joined = place.enrolled()
        own = public_key(place.key)
    except MmfmError as error:
        yield Finding("failed", str(error))
        return
    if own.split()[:2] != joined.public_key.split()[:2]:
        yield Finding(
            "failed", f"{place.key}: is not the key that the coordinator registered; restore it, or join anew"
        )
        return
    if place.key.stat().st_mode & 0o077:
        yield Finding("failed", f"{place.key}: others may read it; chmod 600 it")
    yield from _authority(place)
    yield from _answer(place, joined.address)


def _authority(place: Place) -> Iterator[Finding]:
    try:
        certificates = x509.load_pem_x509_certificates(place.authority.read_bytes())
    except ValueError:
        yield Finding("failed", f"{place.authority}: is no certificate; join anew")
        return
    for certificate in certificates:
        ends = certificate.not_valid_after_utc.timestamp()
        level = "failed" if ends < time.time() else "warning" if ends < time.time() + SOON_SECONDS else "ok"
        remedy = "" if level == "ok" else "; ask the coordinator for a new enrolment"
        yield Finding(level, f"{place.authority}: the consortium's authority is valid until {day(ends)}{remedy}")


def _answer(place: Place, address: str) -> Iterator[Finding]:
    try:
        trust = ssl.create_default_context(cafile=str(place.authority))
        # Flower uses the same library, and so the same proxies from the environment.
        with httpx.Client(verify=trust, timeout=SECONDS) as client:
            asked = time.time()
            answer = client.get(f"https://{address}/health")
            took = time.time() - asked
    except httpx.ProxyError as error:
        yield Finding("failed", f"{address}: the proxy refuses ({error}); have it let CONNECT to this address through")
    except httpx.ConnectTimeout:
        yield Finding("failed", f"{address}: no answer within {SECONDS:g} s; open outbound TCP to it in the firewall")
    except httpx.ConnectError as error:
        yield Finding("failed", f"{address}: {_why(error)}")
    except (httpx.HTTPError, ssl.SSLError, OSError) as error:
        yield Finding("failed", f"{address}: {type(error).__name__}; is it the coordinator's Flower link?")
    else:
        yield Finding("ok", f"{address}: answers over TLS, and is who the consortium's authority says ({took:.2f} s)")
        yield _clock(answer.headers.get("date"), asked + took / 2)


def _why(error: httpx.ConnectError) -> str:
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        reason = text.partition("verify failed: ")[2].partition(" (_ssl")[0] or "it is not trusted"
        return f"its certificate is refused ({reason}); something between opens TLS, or the coordinator must renew it"
    if "SSL" in text:
        return "does not speak TLS there; is it the coordinator's Flower link?"
    if "Name or service" in text or "name resolution" in text:
        return "its name is unknown here; mend DNS, or set HTTPS_PROXY if only a proxy resolves names"
    return f"cannot be connected ({text}); is the coordinator up, and outbound TCP to it open in the firewall?"


def _clock(date: str | None, now: float) -> Finding:
    if date is None:
        return Finding("warning", "the coordinator does not say what time it is, so that the clocks were not compared")
    skew = now - parsedate_to_datetime(date).timestamp()
    way = f"this clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the coordinator's"
    if not -BEHIND_SECONDS < skew < AHEAD_SECONDS:
        return Finding("failed", f"{way}, which refuses it; set both by NTP")
    if abs(skew) > AHEAD_SECONDS:
        return Finding("warning", f"{way}; set both by NTP")
    return Finding("ok", "the clocks agree")
