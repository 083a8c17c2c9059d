"""`mmfm site`: what a hospital engineer types, with files that are right, wrong, stale, missing and used twice."""

import json
import ssl
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from certificates import Authority
from command_line import plain
from tiny import tiny_federation, write_sites
from typer.testing import CliRunner, Result

import client.reach
from client import gates
from client.agent import Agent
from client.commands import site as commands
from client.egress import FIRST
from client.enrol import public_key
from mmfm_core import enrolment
from mmfm_core.config import Federation, Site
from mmfm_core.config.loading import dump, sha256
from mmfm_core.config.site import Limits, Release
from mmfm_core.enrolment import Enrolment, Request
from mmfm_core.errors import MmfmError
from mmfm_core.protocol import Describe, Refusal, SiteDescription

WEEK = 7 * 86400.0


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Site]:
    return write_sites(tmp_path_factory.mktemp("hospitals"))


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.make()


def typed(*words: str | Path, answers: str | None = None) -> Result:
    """What a command printed and its exit code."""
    return CliRunner().invoke(commands, [str(word) for word in words], input=answers)


def mistake(*words: str | Path) -> str:
    """The sentence with which a command fails."""
    result = typed(*words)
    assert isinstance(result.exception, MmfmError), result.output
    return str(result.exception)


def done(*words: str | Path, answers: str | None = None) -> str:
    result = typed(*words, answers=answers)
    assert result.exit_code == 0, (result.output, result.exception)
    return " ".join(result.output.split())


@pytest.fixture
def here(tmp_path: Path, sites: dict[str, Site]) -> Path:
    """A site that was described and made."""
    (tmp_path / "north").mkdir()
    (tmp_path / "north" / "site.yaml").write_text(dump(sites["north"]))
    done("init", tmp_path / "north", "--name", "north")
    return tmp_path / "north"


def bundle_for(here: Path, authority: Authority, /, **changes: Any) -> Path:
    """What an honest coordinator answers to a site's request, but for `changes`."""
    request = enrolment.read(here / "north.request.json", Request)
    now = time.time()
    honest: dict[str, Any] = {
        "consortium": "trial",
        "site": request.site,
        "address": "127.0.0.1:8000",
        "authority": authority.pem,
        "public_key": request.public_key,
        "issued": now,
        "expires": now + WEEK,
    }
    path = here.parent / "bundle.json"
    enrolment.write(path, Enrolment.model_validate(honest | changes))
    return path


def test_init_makes_a_key_that_nobody_else_reads_and_a_request_without_secrets(tmp_path: Path) -> None:
    said = done("init", tmp_path / "site", "--name", "north")
    key, request = tmp_path / "site/relay/node.key", tmp_path / "site/north.request.json"
    assert str(request) in said
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "site").stat().st_mode) == 0o700
    # Asked of OpenSSH itself: the request's key belongs to the private one, on the curve that Flower takes.
    derived = subprocess.run(["ssh-keygen", "-y", "-f", key], check=True, capture_output=True, text=True).stdout
    asked = enrolment.read(request, Request)
    assert asked.public_key.split()[:2] == derived.split()[:2]
    assert asked.public_key.startswith("ecdsa-sha2-nistp384 ")
    assert asked.versions["flwr"].startswith("1.41.")
    assert "PRIVATE" not in request.read_text()
    described = yaml.safe_load((tmp_path / "site/site.yaml").read_text())
    assert (described["name"], described["release"]) == ("north", {"min_count": 5})


def test_init_again_keeps_what_is_there(here: Path) -> None:
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    done("init", here, "--name", "north")
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before
    assert "is not the name in it, 'north'" in mistake("init", here, "--name", "south")
    assert "must start with a letter" in mistake("init", here, "--name", "../north")


def test_a_site_joins_once(here: Path, authority: Authority) -> None:
    bundle = bundle_for(here, authority)
    assert "127.0.0.1:8000" in done("join", bundle, "-d", here)
    assert (here / "relay/ca.crt").read_text() == authority.pem
    assert "was used at this site already" in mistake("join", bundle, "-d", here)
    newer = bundle_for(here, authority, address="127.0.0.1:8001", issued=time.time() + 1)
    assert "127.0.0.1:8001" in done("join", newer, "-d", here)
    assert "is older than the enrolment" in mistake("join", bundle_for(here, authority, issued=1000.0), "-d", here)
    assert "127.0.0.1:8001" in (here / "relay/enrolment.json").read_text()


WRONG_BUNDLES: dict[str, tuple[Callable[[Authority], dict[str, Any]], str]] = {
    "another site's": (lambda _: {"site": "south"}, "site: it is for 'south', and this site is 'north'"),
    "another key": (
        lambda _: {"public_key": "ecdsa-sha2-nistp384 AAAA"},
        "public_key: the coordinator registered another",
    ),
    "expired": (lambda _: {"issued": 1000.0, "expires": 2000.0}, "expires: it was valid until 1970-01-01 00:33 UTC"),
    "no port": (lambda _: {"address": "coordinator.example"}, "address: 'coordinator.example' is not HOST:PORT"),
    "from the future": (
        lambda _: {"issued": 9e12, "expires": 9e12 + WEEK},
        "issued: that day is yet to come",
    ),
    "a web page": (lambda _: {"address": "https://x:1"}, "address: 'https://x:1' is not HOST:PORT"),
    "a command": (lambda _: {"address": "evil;rm:80"}, "address: 'evil;rm:80' is not HOST:PORT"),
    "no certificate": (lambda _: {"authority": "x"}, "authority: is no certificate"),
    "old authority": (
        lambda _: {"authority": Authority.make(days=-1).pem},
        "authority: this certificate was valid until",
    ),
}


@pytest.mark.parametrize(("changes", "said"), WRONG_BUNDLES.values(), ids=WRONG_BUNDLES.keys())
def test_a_bundle_that_is_not_for_this_site_now_changes_nothing(
    here: Path, authority: Authority, changes: Callable[[Authority], dict[str, Any]], said: str
) -> None:
    bundle = bundle_for(here, authority, **changes(authority))
    assert mistake("join", bundle, "-d", here).startswith(f"{bundle}: {said}")
    assert not (here / "relay/enrolment.json").exists()


def test_files_that_are_none_are_named(here: Path, tmp_path: Path, authority: Authority) -> None:
    nothing, text, request = tmp_path / "none.json", tmp_path / "text.json", here / "north.request.json"
    text.write_text("{")
    assert f"{nothing}: cannot be read" in mistake("join", nothing, "-d", here)
    assert f"{text}: is not an enrolment (not JSON)" in mistake("join", text, "-d", here)
    assert f"{request}: is not an enrolment: " in mistake("join", request, "-d", here)
    bundle = bundle_for(here, authority)
    for words in (("join", bundle), ("run",), ("status",), ("approve", text)):
        assert "there is no site here; name its directory" in mistake(*words, "-d", tmp_path / "elsewhere")
    assert "relay/enrolment.json: is not there; send the request" in mistake("run", "-d", here)
    (here / "relay/node.key").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    assert "is not a whole private key" in mistake("join", bundle, "-d", here)
    (here / "relay/node.key").unlink()
    assert "this site has no key" in mistake("join", bundle, "-d", here)
    assert "exclude each other" in mistake("run", "-d", here, "--agent-only", "--relay-only")


def document(folder: Path, **changes: Any) -> tuple[Path, Federation]:
    federation = tiny_federation(**changes)
    path = folder / "federation.yaml"
    path.write_text(yaml.safe_dump(plain(federation), sort_keys=False))
    return path, federation


def test_approval_says_what_leaves_and_is_asked_for(here: Path, tmp_path: Path) -> None:
    path, federation = document(tmp_path, parameters={"local": ["heads.*"]})
    agent, question = Agent.open(here), Describe(sha256(federation))
    declined = typed("approve", path, "-d", here, answers="n\n")
    assert declined.exit_code == 1
    assert isinstance(agent.answer(question), Refusal)
    assert not (here / "approved").exists()
    said = done("approve", path, "-d", here, answers="y\n")
    assert isinstance(agent.answer(question), SiteDescription)
    # Counted by the definition: what the site builds, less what is local.
    state = agent.participate(sha256(federation)).initial
    for block in ("encoders.scan", "encoders.note", "encoders.labs", "fusion"):
        inside = [tensor for name, tensor in state.items() if name.startswith(block)]
        assert f"{block} ({len(inside)} tensors, {sum(t.nbytes for t in inside) / 1e6:.3f} MB)" in said
    total = sum(tensor.nbytes for name, tensor in state.items() if not name.startswith("heads."))
    assert f"{total / 1e6:.3f} MB a round at most, {2 * total / 1e6:.3f} MB in all" in said
    assert "the model's heads.disease (4 tensors), what is adapted here" in said
    assert "auroc, auprc, f1, ece, accuracy of 'disease'" in said
    assert "PRIVACY: without differential privacy" in said
    assert sha256(federation) in said


def test_approval_is_withdrawn_by_the_beginning_of_its_hash(here: Path) -> None:
    one, other = (gates.approve(here / "approved", tiny_federation(seed=seed)) for seed in range(2))
    agent = Agent.open(here)
    assert isinstance(agent.answer(Describe(one)), SiteDescription)
    for wrong in ("0" * 64, "", "*", "../site"):
        assert "no approved document begins so" in mistake("revoke", wrong, "-d", here)
    more = [gates.approve(here / "approved", tiny_federation(seed=seed)) for seed in range(2, 18)]
    twice = next(document[0] for document in more if sum(other[0] == document[0] for other in more) > 1)
    assert "approved documents begin so; `mmfm site status` lists them" in mistake("revoke", twice, "-d", here)
    done("revoke", one[:12], "-d", here)
    assert isinstance(agent.answer(Describe(one)), Refusal)
    assert isinstance(agent.answer(Describe(other)), SiteDescription)
    assert "no approved document begins so" in mistake("revoke", one, "-d", here)


def test_a_document_that_this_site_cannot_serve_is_not_approved(here: Path, tmp_path: Path) -> None:
    path, _ = document(tmp_path)
    text = path.read_text()
    path.write_text(text.replace("rounds: 2", "rouns: 2"))
    assert f"{path}: stages.0: unknown key 'rouns'; did you mean 'rounds'?" in mistake("approve", path, "-d", here)
    assert "cannot be read" in mistake("approve", tmp_path / "none.yaml", "-d", here)
    path.write_text(text)
    described = yaml.safe_load((here / "site.yaml").read_text())
    described["modalities"] = {"other": "scan"}
    (here / "site.yaml").write_text(yaml.safe_dump(described))
    assert "maps none of those that the federation has (scan, note, labs)" in mistake("approve", path, "-d", here)
    assert not (here / "approved").exists()


def test_status_and_egress_tell_what_happened(here: Path, tmp_path: Path, authority: Authority) -> None:
    path, federation = document(tmp_path)
    assert "nobody asked" not in done("status", "-d", here)
    for verb in ("show", "verify"):
        assert "egress.sqlite: there is no egress log" in mistake("egress", verb, "-d", here)
    done("approve", path, "-d", here, "--yes")
    assert "nobody asked for it yet" in done("status", "-d", here)
    done("join", bundle_for(here, authority), "-d", here)
    agent = Agent.open(here)
    agent.answer(Describe(sha256(federation)))
    agent.answer(Describe("f" * 64))
    status = done("status", "-d", here)
    number, head = agent.egress.head()
    for said in (
        "does not answer at",
        "trial at 127.0.0.1:8000",
        "the description answered",
        f"{number} entries, head {head}",
    ):
        assert said in status
    assert "not approved at this site" in done("egress", "show", "-d", here, "--last", "1")
    lines = typed("egress", "show", "-d", here, "--json").output.splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["SiteDescription", "Refusal"]
    assert head in done("egress", "verify", "-d", here)
    assert head in done("egress", "verify", "-d", here, "--noted", FIRST)
    assert "cut off, or rewritten" in mistake("egress", "verify", "-d", here, "--noted", "a" * 64)


def test_check_reads_every_row_and_tries_a_step(here: Path, tmp_path: Path, sites: dict[str, Site]) -> None:
    path, _ = document(tmp_path)
    without = typed("check", "-d", here, "--agent-only")
    assert without.exit_code == 0
    assert "no document is approved yet" in without.output
    done("approve", path, "-d", here, "--yes")
    less = {name: mapping for name, mapping in sites["north"].modalities.items() if name != "note"}
    strict = {"modalities": less, "limits": Limits(seconds=1e-6), "release": Release()}
    (here / "site.yaml").write_text(dump(sites["north"].model_copy(update=strict)))
    tight = typed("check", "-d", here, "--agent-only")
    said = " ".join(tight.output.split())
    assert tight.exit_code == 1
    assert "modalities: scan, labs; without note" in said
    assert "every row and file was read, 36 studies" in said
    assert "models compute on 'cpu'" in said
    assert "a round would exceed limits.seconds" in said
    image = next((sites["north"].manifest.parent / "scans").iterdir())
    whole = image.read_bytes()
    try:
        image.write_bytes(whole[:40])
        broken = typed("check", "-d", here, "--agent-only")
    finally:
        image.write_bytes(whole)
    assert broken.exit_code == 1
    assert f"{sites['north'].manifest}, row " in broken.output
    assert "the image of 'scan' cannot be read as" in " ".join(broken.output.split())


@contextmanager
def coordinator(tls: ssl.SSLContext | None, skew: float = 0.0) -> Iterator[str]:
    """Somebody at an address who says what time it is."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.end_headers()

        def date_time_string(self, timestamp: float | None = None) -> str:
            return formatdate((timestamp or time.time()) + skew, usegmt=True)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


REACH: dict[str, tuple[Callable[[Authority, Path], ssl.SSLContext | None], float, str, bool]] = {
    "all well": (lambda a, f: a.serving(f), 0.0, "the clocks agree", True),
    "slow clock": (lambda a, f: a.serving(f), 60.0, "this clock is 60 s behind", True),
    "late": (lambda a, f: a.serving(f), 4000.0, "behind the coordinator's, which refuses it; set both by NTP", False),
    "early": (lambda a, f: a.serving(f), -60.0, "ahead of the coordinator's, which refuses it; set both by NTP", False),
    "another authority": (lambda _, f: Authority.make().serving(f), 0.0, "its certificate is refused", False),
    "expired": (lambda a, f: a.serving(f, days=-1), 0.0, "certificate is refused (certificate has expired)", False),
    "plain text": (lambda _a, _f: None, 0.0, "does not speak TLS there", False),
}


@pytest.mark.parametrize(("tls", "skew", "said", "well"), REACH.values(), ids=REACH.keys())
def test_check_says_whether_the_coordinator_would_be_reached(
    here: Path,
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
    tls: Callable[[Authority, Path], ssl.SSLContext | None],
    skew: float,
    said: str,
    well: bool,
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with coordinator(tls(authority, here.parent / "tls"), skew) as address:
        done("join", bundle_for(here, authority, address=address), "-d", here)
        result = typed("check", "-d", here, "--relay-only")
    printed = " ".join(result.output.split())
    assert said.replace("60 s", "") in printed.replace("59 s", "").replace("60 s", "").replace("61 s", "")
    assert (result.exit_code == 0) == well


def test_check_names_what_stands_between(here: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "relay/enrolment.json: is not there" in typed("check", "-d", here, "--relay-only").output
    with coordinator(None) as address:
        pass  # nobody is there any more
    done("join", bundle_for(here, authority, address=address), "-d", here)
    assert "is the coordinator up, and outbound TCP" in " ".join(
        typed("check", "-d", here, "--relay-only").output.split()
    )
    with coordinator(None) as proxy:  # it knows no CONNECT
        monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy}")
        monkeypatch.setenv("NO_PROXY", "")
        monkeypatch.setattr(client.reach, "SECONDS", 5.0)
        said = " ".join(typed("check", "-d", here, "--relay-only").output.split())
    assert "the proxy refuses" in said
    (here / "relay/node.key").chmod(0o644)
    assert "others may read it; chmod 600" in " ".join(typed("check", "-d", here, "--relay-only").output.split())
    assert public_key(here / "relay/node.key").startswith("ecdsa-sha2-nistp384")
