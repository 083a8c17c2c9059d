"""`mmfm coordinator init`: a directory with everything that a coordinator needs."""

import ipaddress
import re
import secrets
from pathlib import Path

from mmfm_core.errors import MmfmError
from mmfm_core.storage import write_secret, write_text
from server.consortium.certificates import issue, make_authority
from server.consortium.settings import DEFAULT_PORT, SETTINGS, Consortium, host_and_port, is_loopback

CONNECTION = "consortium"
"""The name of the link in Flower's own configuration: `FLWR_HOME=DIRECTORY/flower flwr list consortium`."""

WITH_DOOR = """\
# A coordinator of mmfm. Change what you need, then 'mmfm coordinator down' and 'up'.

name: {name}

# Where sites dial. The host is in the server's certificate: after a change, 'mmfm coordinator certificate --renew',
# and every site needs a new enrolment ('mmfm coordinator enrol REQUEST --replace').
address: "{address}"

# Where the door (nginx) listens for them. It lets sites through to what they need and refuses all else.
listen: "{listen}"
door: true

# Flower's SuperLink. Whoever reaches it may start and stop runs, so it stays on the loopback interface.
link: "127.0.0.1:8000"

# /health and /metrics (Prometheus), for this machine only.
monitor: "127.0.0.1:8001"

# An enrolment that a site has not used for so long is refused.
enrolment_days: 14
"""

WITHOUT_DOOR = """\
# A coordinator of mmfm for a trial on one machine: sites dial the loopback interface, so no door is needed.
# For sites on other machines: 'mmfm coordinator init' in another directory, with --address HOST.

name: {name}
address: "{address}"
listen: "{address}"
link: "{address}"
door: false

# /health and /metrics (Prometheus), for this machine only.
monitor: "127.0.0.1:{monitor}"

# An enrolment that a site has not used for so long is refused.
enrolment_days: 14
"""


def found(directory: Path, name: str, address: str) -> Consortium:
    """Make a coordinator's directory: CA, server certificate, secrets, settings.

    Raises:
        MmfmError: the directory is not empty, or the name or address is none.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
        raise MmfmError(f"--name: '{name}' must begin with a letter and hold only letters, digits, '_' and '-'")
    if ":" not in address or address.endswith("]") or _is_bare_ipv6(address):
        address = f"[{address}]:{DEFAULT_PORT}" if _is_bare_ipv6(address) else f"{address}:{DEFAULT_PORT}"
    try:
        host, port = host_and_port(address)
    except MmfmError as error:
        raise MmfmError(f"--address: {error}") from error
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise MmfmError(f"{directory}: is not empty; name a new directory, because init never overwrites a key")
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)
    for folder in ("keys", "state", "logs"):
        (directory / folder).mkdir(mode=0o700)
    text = WITHOUT_DOOR if is_loopback(host) else WITH_DOOR
    # Last comes the file that makes it a coordinator's directory.
    settings = text.format(name=name, address=address, listen=f"0.0.0.0:{port}", monitor=port + 1)
    keys, certificates = directory / "keys", directory / "certificates"
    make_authority(name, keys / "ca.key", certificates / "ca.crt")
    issue(host, keys / "ca.key", certificates / "ca.crt", keys / "server.key", certificates / "server.crt")
    write_secret(keys / "superexec.secret", secrets.token_hex(32).encode())
    write_text(directory / SETTINGS, settings)
    consortium = Consortium.open(directory)
    write_text(
        consortium.flower / "config.toml",
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "{consortium.settings.link}"\n'
        f'root-certificates = "{consortium.authority}"\n',
    )
    return consortium


def _is_bare_ipv6(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).version == 6
    except ValueError:
        return False
