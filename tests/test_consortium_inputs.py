"""`mmfm coordinator`: what it makes, and what it refuses, file by file; no process is started."""

import json
import os
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from hospital import free_ports, wait
from tiny import tiny_federation

from mmfm_core.config.loading import dump
from mmfm_core.enrolment import Enrolment, Request, read, write
from mmfm_core.errors import MmfmError
from server.consortium import certificates, enrolling, monitor, running, services, watching
from server.consortium.founding import found
from server.consortium.link import FlowerRun, Node
from server.consortium.settings import Consortium
from server.record import Run

Key = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


@dataclass
class FakeLink:
    """Stands for Flower's link."""

    registered: dict[int, bytes] = field(default_factory=dict)
    gone: list[int] = field(default_factory=list)
    submitted: list[FlowerRun] = field(default_factory=list)
    online: set[int] = field(default_factory=set)

    def register(self, _site: str, public_key: bytes) -> int:
        self.registered[len(self.registered) + 1] = public_key
        return len(self.registered)

    def unregister(self, node: int) -> None:
        self.gone.append(node)

    def runs(self) -> list[FlowerRun]:
        return self.submitted

    def start(self, _bundle: Path, directory: Path) -> int:
        self.submitted.append(FlowerRun(len(self.submitted) + 1, False, "", directory))
        return len(self.submitted)

    def nodes(self) -> dict[int, Node]:
        return {
            node: Node(node, "online" if node in self.online else "offline", time.time() - 7)
            for node in self.registered
        }


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    return found(tmp_path / "coordinator", "trial", "coordinator.example.org")


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> FakeLink:
    fake = FakeLink()

    @contextmanager
    def connect(_consortium: Consortium) -> Iterator[FakeLink]:
        yield fake

    for module in (enrolling, running, watching):
        monkeypatch.setattr(module, "connect", connect)
    return fake


def general_name(host: str) -> x509.DNSName | x509.IPAddress:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def request_of(folder: Path, site: str, key: Key | None = None, flwr: str = "1.41.0", **changes: Any) -> Path:
    key = key or ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    path = folder / f"{site}.request.json"
    request = Request(site=site, public_key=f"{public} {site}", versions={"flwr": flwr})
    write(path, request.model_copy(update=changes))
    return path


def enrol(consortium: Consortium, request: Path, *, replace: bool = False) -> Enrolment:
    return enrolling.enrol(consortium, request, request.with_suffix(".out"), replace=replace)


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("coordinator.example.org", "coordinator.example.org"),
        ("192.0.2.7:9000", "192.0.2.7"),
        ("[2001:db8::1]", "2001:db8::1"),
    ],
)
def test_sites_accept_the_certificate_that_init_makes_and_no_other_host(
    tmp_path: Path, address: str, host: str
) -> None:
    made = found(tmp_path / "coordinator", "trial", address)
    server = x509.load_pem_x509_certificate(made.certificate.read_bytes())
    authority = x509.load_pem_x509_certificate(made.authority.read_bytes())
    # The library's own verification, as strict as a browser's.
    policy = PolicyBuilder().store(Store([authority]))
    for name in (host, "127.0.0.1"):
        policy.build_server_verifier(general_name(name)).verify(server, [])
    with pytest.raises(VerificationError):
        policy.build_server_verifier(x509.DNSName("elsewhere.example.org")).verify(server, [])


def test_only_the_owner_can_read_what_init_makes(consortium: Consortium) -> None:
    assert stat.S_IMODE(consortium.directory.stat().st_mode) == 0o700
    for path in consortium.keys.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {path.name for path in consortium.keys.iterdir()} == {"ca.key", "server.key", "superexec.secret"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("my trial", "host"), "--name: 'my trial' must begin with a letter"),
        (("trial", "host:port"), "--address: 'host:port' is not HOST:PORT"),
        (("trial", "host:0"), "--address: 'host:0' is not HOST:PORT"),
        (("trial", "https://host:1"), "--address: 'https://host:1' is not HOST:PORT"),
    ],
)
def test_init_says_what_is_wrong(tmp_path: Path, arguments: tuple[str, str], sentence: str) -> None:
    with pytest.raises(MmfmError, match=sentence):
        found(tmp_path / "new", *arguments)
    assert not (tmp_path / "new").exists()


def test_init_overwrites_no_key(consortium: Consortium) -> None:
    with pytest.raises(MmfmError, match="is not empty; name a new directory"):
        found(consortium.directory, "trial", "host")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"link": "0.0.0.0:8000"}, "link: must be on the loopback interface"),
        ({"monitor": "192.0.2.7:1"}, "monitor: must be on the loopback interface"),
        ({"door": False}, "door: can be left out only where"),
        ({"listen": "8443"}, "listen: '8443' is not HOST:PORT"),
        ({"adress": "host:1"}, "unknown key 'adress'; did you mean 'address'"),
    ],
)
def test_settings_that_would_open_the_coordinator_are_refused(
    consortium: Consortium, change: dict[str, Any], sentence: str
) -> None:
    path = consortium.directory / "coordinator.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
    with pytest.raises(MmfmError, match=sentence) as raised:
        Consortium.open(consortium.directory)
    assert str(path) in str(raised.value)


def test_a_folder_that_is_no_coordinator_is_named(tmp_path: Path) -> None:
    with pytest.raises(MmfmError, match="there is no coordinator here; name its directory"):
        Consortium.open(tmp_path)


def test_a_port_in_use_is_named_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        made = found(tmp_path / "coordinator", "trial", f"127.0.0.1:{port}")
        with pytest.raises(MmfmError, match=rf"link: 127\.0\.0\.1:{port} cannot be used \(Address already in use\)"):
            services.check_ready(made)


def test_a_certificate_of_no_use_is_refused_and_renewed(consortium: Consortium, tmp_path: Path) -> None:
    host = "coordinator.example.org"

    def check() -> None:
        certificates.check_server(consortium.certificate, consortium.authority, host)

    def issue(host: str, folder: Path) -> None:
        keys, server_key = folder / "keys", consortium.keys / "server.key"
        certificates.issue(
            host, keys / "ca.key", folder / "certificates" / "ca.crt", server_key, consortium.certificate
        )

    check()
    issue("elsewhere.example.org", consortium.directory)
    with pytest.raises(MmfmError, match=r"does not name 'coordinator\.example\.org'"):
        check()
    issue(host, found(tmp_path / "other", "trial", host).directory)
    with pytest.raises(MmfmError, match="was not signed by"):
        check()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(certificates, "SERVER_DAYS", -1)
        patched.setattr(certificates, "BACK_DATED", timedelta(days=9))
        issue(host, consortium.directory)
    expired = datetime.now(UTC) - timedelta(days=1)
    with pytest.raises(MmfmError, match=rf"expired on {expired:%Y-%m-%d}.*certificate --renew"):
        services.check_ready(consortium)
    issue(host, consortium.directory)
    check()


def test_the_door_lets_through_what_sites_need_and_no_more(consortium: Consortium) -> None:
    services.write_door(consortium)
    text = (consortium.state / "nginx.conf").read_text()
    assert "listen 0.0.0.0:8443 ssl;" in text
    assert "location / { return 403; }" in text
    assert text.count("proxy_pass") == 1
    assert "proxy_ssl_verify on;" in text


def test_a_site_is_enrolled_once_and_its_key_locked_out_for_good(
    consortium: Consortium, link: FakeLink, tmp_path: Path
) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    request = request_of(tmp_path, "north", key)
    enrolment = enrol(consortium, request)
    assert read(request.with_suffix(".out"), Enrolment) == enrolment
    assert (enrolment.site, enrolment.address) == ("north", "coordinator.example.org:8443")
    assert enrolment.authority == consortium.authority.read_text()
    assert enrolment.expires - enrolment.issued == pytest.approx(14 * 86400, abs=1)
    assert serialization.load_pem_public_key(link.registered[1]) == key.public_key()

    with pytest.raises(MmfmError, match=r"'north' is enrolled already, since .*give --replace"):
        enrol(consortium, request)
    enrol(consortium, request, replace=True)  # the same key: only a new file
    assert (list(link.registered), link.gone) == ([1], [])
    with pytest.raises(MmfmError, match="this key is in use by site 'north'"):
        enrol(consortium, request_of(tmp_path, "south", key))
    request = request_of(tmp_path, "north")
    enrol(consortium, request, replace=True)
    assert (list(link.registered), link.gone) == ([1, 2], [1])
    with pytest.raises(MmfmError, match="this key was revoked"):
        enrol(consortium, request_of(tmp_path / "old", "north", key), replace=True)

    link.registered.clear()  # the link's database was lost
    enrol(consortium, request, replace=True)
    assert list(link.registered) == [1]
    assert enrolling.registry_of(consortium).sites() == {1: "north"}
    link.gone.clear()

    enrolling.revoke(consortium, "north")
    assert link.gone == [1]
    assert not enrolling.registry_of(consortium).active()
    with pytest.raises(MmfmError, match="'north' is not enrolled; enrolled are: none"):
        enrolling.revoke(consortium, "north")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"site": "federation"}, "site: 'federation' stands for all sites"),
        ({"public_key": "ssh-rsa nonsense"}, "public_key: is not a key"),
        ({"key": ed25519.Ed25519PrivateKey.generate()}, "public_key: is not an EC key on P-384"),
        ({"key": ec.generate_private_key(ec.SECP256R1())}, "public_key: is not an EC key on P-384"),
        ({"flwr": "1.40.2"}, "versions.flwr: the site has 1.40.2 and this coordinator 1.41"),
        ({"versions": {}}, "versions.flwr: the site has none"),
    ],
)
def test_a_request_that_is_of_no_use_is_refused(
    consortium: Consortium, link: FakeLink, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    request = request_of(tmp_path, changes.pop("site", "north"), **changes)
    with pytest.raises(MmfmError, match=sentence) as raised:
        enrol(consortium, request)
    assert str(request) in str(raised.value)
    assert not link.registered


def test_files_that_are_no_requests_are_named(consortium: Consortium, link: FakeLink, tmp_path: Path) -> None:
    enrolment = request_of(tmp_path, "north")
    enrol(consortium, enrolment)
    (tmp_path / "cut.json").write_text('{"format": "mmfm-site')
    for path, sentence in (
        (enrolment.with_suffix(".out"), "is not a site's request"),
        (tmp_path / "cut.json", "not JSON"),
        (tmp_path / "none.json", "cannot be read"),
    ):
        with pytest.raises(MmfmError, match=sentence):
            enrol(consortium, path)
    assert list(link.registered) == [1]


def test_a_run_needs_enough_sites_and_a_free_place(consortium: Consortium, link: FakeLink, tmp_path: Path) -> None:
    document = tmp_path / "tiny.yaml"
    document.write_text(dump(tiny_federation()))

    def begin(*, replace: bool = False) -> Run:
        return running.begin(consortium, document, None, replace=replace)

    with pytest.raises(MmfmError, match=r"min_sites is 2, and 0 sites are enrolled \(none\)"):
        begin()
    for site in ("north", "south"):
        enrol(consortium, request_of(tmp_path, site))
    run = begin()
    assert run.facts["status"] == "starting"
    assert (run.facts["flower_run"], run.facts["expected_sites"]) == (1, 2)
    with pytest.raises(MmfmError, match="this run goes on; stop it first"):
        begin(replace=True)
    with pytest.raises(MmfmError, match="'tinny' is no run of this coordinator; known: tiny"):
        running.find(consortium, "tinny")


def test_a_run_whose_process_died_is_failed_with_a_cause_and_can_be_resumed(
    consortium: Consortium, link: FakeLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tmp_path / "tiny.yaml"
    document.write_text(dump(tiny_federation()))
    for site in ("north", "south"):
        enrol(consortium, request_of(tmp_path, site))
    run = running.begin(consortium, document, None, replace=False)
    running.settle_all(consortium, link)  # type: ignore[arg-type]
    assert run.facts["status"] == "starting"
    link.submitted[0] = FlowerRun(1, True, "No heartbeat received", run.directory)
    with run.locked():  # its process writes down how it ended
        running.settle_all(consortium, link)  # type: ignore[arg-type]
        assert run.facts["status"] == "starting"
    running.settle_all(consortium, link)  # type: ignore[arg-type]
    assert run.facts["status"] == "failed"
    assert "No heartbeat received" in run.facts["cause"]
    running.resume(consortium, "tiny")
    assert (run.facts["status"], run.facts["flower_run"], run.facts["cause"]) == ("starting", 2, None)
    link.submitted = []
    running.settle_all(consortium, link)  # type: ignore[arg-type]  # a look from before the submission
    assert run.facts["status"] == "starting"
    monkeypatch.setattr(running, "SUBMIT_SECONDS", 0.0)  # the database was lost
    running.settle_all(consortium, link)  # type: ignore[arg-type]
    assert "does not know this run" in run.facts["cause"]
    run.update(status="completed", cause=None)
    running.settle_all(consortium, link)  # type: ignore[arg-type]
    assert run.facts["status"] == "completed"
    with pytest.raises(MmfmError, match="this run is completed"):
        running.resume(consortium, "tiny")


def test_the_monitor_tells_health_and_figures(consortium: Consortium, link: FakeLink, tmp_path: Path) -> None:
    watch = monitor.Monitor(consortium)
    assert watch.answer("/health")[0] == 503
    document = tmp_path / "tiny.yaml"
    document.write_text(dump(tiny_federation()))
    for site in ("north", "south"):
        enrol(consortium, request_of(tmp_path, site))
    link.online.add(1)
    run = running.begin(consortium, document, None, replace=False)
    run.update(round=1, void_rounds=2, round_ended=time.time() - 60)
    watch.look()
    code, _, text = watch.answer("/health")
    assert (code, json.loads(text)) == (200, {"status": "ok", "problem": None})
    figures = dict(line.rsplit(" ", 1) for line in watch.answer("/metrics")[2].splitlines() if line[0] != "#")
    assert figures["mmfm_sites_enrolled"] == "2"
    assert figures["mmfm_sites_connected"] == "1"
    assert figures['mmfm_site_connected{site="south"}'] == "0"
    assert float(figures['mmfm_site_last_seen_seconds{site="north"}']) == pytest.approx(7, abs=5)
    assert figures['mmfm_run_round{run="tiny"}'] == "1"
    assert figures['mmfm_run_rounds{run="tiny"}'] == "3"
    assert figures['mmfm_run_void_rounds{run="tiny"}'] == "2"
    assert figures['mmfm_run_status{run="tiny",status="starting"}'] == "1"
    assert float(figures['mmfm_run_seconds_since_round{run="tiny"}']) == pytest.approx(60, abs=5)
    assert watch.answer("/")[0] == 404


@pytest.mark.skipif(
    shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") is None, reason="nginx is not installed"
)
def test_a_door_that_a_killed_up_left_behind_is_ended(consortium: Consortium) -> None:
    (port,) = free_ports(1)
    path = consortium.directory / "coordinator.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"listen": f"127.0.0.1:{port}"}))
    consortium = Consortium.open(consortium.directory)
    services.write_door(consortium)
    with subprocess.Popen(services.commands(consortium)["door"], cwd=consortium.logs) as door:
        wait(lambda: services.door_answers(consortium), 30)
        assert services.end_leftovers(consortium) >= 2  # a master and its worker, which has the port too
        door.wait(10)
    assert not services.door_answers(consortium)
