"""The programs of a coordinator: what each is started with, and `mmfm coordinator up`, which keeps them running."""

import fcntl
import json
import os
import shutil
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmfm_core.errors import MmfmError
from mmfm_core.storage import write_text
from server.consortium.certificates import check_server
from server.consortium.link import is_healthy
from server.consortium.settings import SETTINGS, Consortium, host_and_port
from server.programs import Program, Programs, environment, programs, wait_for, words

START_SECONDS = 120.0
RESTART_SECONDS = 5.0
WATCH_SECONDS = 0.5
MARK = "MMFM_COORDINATOR_PROGRAM"
"""Every program that `up` started carries the coordinator's directory here, by which what a crash left is found."""

SERVED = "MMFM_COORDINATOR_SERVED"
"""The same for a program of `serve`, which belongs to systemd or a container's engine: not for `up` to end."""

FAST = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}  # seconds until a submitted run starts

DOOR = """\
# Written by mmfm from {settings}; change that, not this.
worker_processes 1;
daemon off;
pid {state}/door.pid;
error_log stderr warn;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    server_tokens off;
    client_body_temp_path {state}/door-body;
    proxy_temp_path {state}/door-proxy;
    fastcgi_temp_path {state}/door-unused;
    uwsgi_temp_path {state}/door-unused;
    scgi_temp_path {state}/door-unused;
    server {{
        listen {listen} ssl;
        ssl_certificate {certificate};
        ssl_certificate_key {key};
        ssl_protocols TLSv1.2 TLSv1.3;
        client_max_body_size 64m;
        client_body_timeout 120s;
        location /v1/fleet/ {{
            proxy_pass https://{link};
            proxy_http_version 1.1;
            proxy_ssl_trusted_certificate {authority};
            proxy_ssl_verify on;
            proxy_ssl_name localhost;
            proxy_set_header Host $http_host;
            proxy_request_buffering off;
            proxy_buffering off;
            proxy_read_timeout 300s;
        }}
        location = /v1/fleet/register-node {{ return 403; }}
        location = /v1/fleet/unregister-node {{ return 403; }}
        location / {{ return 403; }}
    }}
}}
"""


def commands(consortium: Consortium) -> dict[str, list[str | Path]]:
    """The command line of each program, in the order in which they start."""
    settings, keys = consortium.settings, consortium.keys
    host, port = host_and_port(settings.link)
    found: dict[str, list[str | Path]] = {
        "superlink": [
            *(sys.executable, "-P", "-m", "server.consortium.superlink", "--host", host, "--port", str(port)),
            *("--ssl-ca-certfile", consortium.authority, "--ssl-certfile", consortium.certificate),
            *("--ssl-keyfile", keys / "server.key", "--enable-supernode-auth", "--database", consortium.database),
            # 'process': a ServerApp lives on when the SuperLink restarts; the secret keeps others from taking its runs.
            *("--isolation", "process", "--superexec-auth-secret-file", consortium.secret),
            "--disable-runtime-dependency-installation",
        ],
        "superexec": [
            *("flower-superexec", "--runtime-api-address", settings.link, "--root-certificates", consortium.authority),
            *("--superexec-auth-secret-file", consortium.secret),
        ],
    }
    if settings.door:
        nginx = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
        if nginx is None:
            raise MmfmError(
                f"{consortium.directory / SETTINGS}: door: needs nginx, which is not installed; install it (Debian: "
                "apt install nginx-light). For a trial on one machine: init --address 127.0.0.1"
            )
        found["door"] = [nginx, "-p", consortium.state, "-c", consortium.state / "nginx.conf", "-e", "stderr"]
    found["monitor"] = ["mmfm", "coordinator", "serve", "monitor", "--directory", consortium.directory]
    return found


def write_door(consortium: Consortium) -> None:
    """The configuration of nginx: what sites need, and nothing that starts runs or lists other sites."""
    if consortium.settings.door:
        text = DOOR.format(
            settings=consortium.directory / SETTINGS,
            state=consortium.state,
            listen=consortium.settings.listen,
            link=consortium.settings.link,
            authority=consortium.authority,
            certificate=consortium.certificate,
            key=consortium.keys / "server.key",
        )
        write_text(consortium.state / "nginx.conf", text)


def check_ready(consortium: Consortium) -> None:
    """Check what would keep the programs from starting, or sites from connecting.

    Raises:
        MmfmError: the certificate is of no use, or a port is in use.
    """
    settings = consortium.settings
    check_server(consortium.certificate, consortium.authority, host_and_port(settings.address)[0])
    commands(consortium)
    for field in ("link", "monitor", *(["listen"] if settings.door else [])):
        host, port = host_and_port(getattr(settings, field))
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise MmfmError(
                    f"{consortium.directory / SETTINGS}: {field}: {host}:{port} cannot be used ({error.strerror}); "
                    "end the program that has it ('ss -ltnp' names it), or choose another"
                ) from error


def serve(consortium: Consortium, name: str) -> None:
    """Become one of the programs; for systemd and containers, which keep it running themselves.

    Raises:
        MmfmError: there is no such program, or the certificate is of no use.
    """
    known = commands(consortium)
    if name not in known:
        raise MmfmError(f"'{name}' is not a program of this coordinator; known: {', '.join(known)}")
    check_server(consortium.certificate, consortium.authority, host_and_port(consortium.settings.address)[0])
    write_door(consortium)
    line = words(known[name])
    os.chdir(consortium.state)
    os.execve(line[0], line, environment(consortium.flower) | FAST | {SERVED: str(consortium.directory)})  # noqa: S606


def up(consortium: Consortium, say: Callable[[str], None], ready: Callable[[], None]) -> None:
    """Start all programs, wait until each is ready, call `ready`, and keep them running until SIGTERM or Ctrl-C.

    Raises:
        MmfmError: the coordinator is up already, something is in the way, or a program does not start.
    """
    with _held(consortium):
        end_leftovers(consortium)
        check_ready(consortium)
        write_door(consortium)
        lines = commands(consortium)
        with programs(consortium.logs, FAST | {MARK: str(consortium.directory)}) as started:
            running = {name: _start(consortium, started, name, line) for name, line in lines.items()}
            say(f"Coordinator '{consortium.settings.name}' is up; sites dial {consortium.settings.address}")
            ready()
            _keep(consortium, started, running, say)


def down(consortium: Consortium) -> bool:
    """End all programs; whether there were any.

    Raises:
        MmfmError: they do not end.
    """
    pid = running_pid(consortium)
    if pid is not None:
        os.kill(pid, signal.SIGTERM)
        end = time.monotonic() + 60
        while running_pid(consortium) is not None:
            if time.monotonic() > end:
                raise MmfmError(f"process {pid} of 'mmfm coordinator up' does not end; end it with 'kill -9 {pid}'")
            time.sleep(0.1)
    return end_leftovers(consortium) > 0 or pid is not None


def running_pid(consortium: Consortium) -> int | None:
    """The process of `mmfm coordinator up`, if there is one."""
    try:
        with (consortium.state / ".up.lock").open("r") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(json.loads((consortium.state / "up.json").read_text())["pid"])
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return None


def end_leftovers(consortium: Consortium) -> int:
    """End what a killed `up` left running; how many processes."""
    left = _left_by_up(consortium)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in _left_by_up(consortium):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        end = time.monotonic() + 8
        while _left_by_up(consortium) and time.monotonic() < end:
            time.sleep(0.1)
    return len(left)


def restart_servers(consortium: Consortium) -> bool:
    """End what shows the server's certificate; `up`, systemd or the container's engine starts it again, with a new one.

    Runs go on meanwhile. Whether there was anything to end.
    """
    found = False
    for pid in _left_by_up(consortium) | _served(consortium):
        with suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"server.consortium.superlink" in words or b"nginx" in words:
                os.kill(pid, signal.SIGTERM)
                found = True
    return found


def _start(consortium: Consortium, started: Programs, name: str, line: list[str | Path]) -> Program:
    program = started.start(name, line, home=consortium.flower)
    checks: dict[str, Callable[[], bool]] = {
        "superlink": lambda: is_healthy(consortium),
        "door": lambda: door_answers(consortium),
    }
    if name in checks:
        wait_for(checks[name], [program], START_SECONDS)
    return program


def _keep(consortium: Consortium, started: Programs, running: dict[str, Program], say: Callable[[str], None]) -> None:
    lines = commands(consortium)
    tried: dict[str, float] = {}
    while True:
        time.sleep(WATCH_SECONDS)
        for name, program in running.items():
            if program.ended and time.monotonic() - tried.get(name, -RESTART_SECONDS) >= RESTART_SECONDS:
                tried[name] = time.monotonic()
                say(f"{name} ended ({program.log} says why) and is started again")
                running[name] = started.start(name, lines[name], home=consortium.flower)


def door_answers(consortium: Consortium) -> bool:
    """Whether the door takes connections, with a certificate that sites accept."""
    host, port = host_and_port(consortium.settings.listen)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 (only compared)
    context = ssl.create_default_context(cafile=str(consortium.authority))
    try:
        with socket.create_connection((host, port), timeout=5) as plain:
            name = host_and_port(consortium.settings.address)[0]
            context.wrap_socket(plain, server_hostname=name).close()
    except OSError:
        return False
    return True


@contextmanager
def _held(consortium: Consortium) -> Iterator[None]:
    with (consortium.state / ".up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MmfmError(
                f"{consortium.directory}: this coordinator is up already; 'mmfm coordinator status' shows it"
            ) from error
        write_text(consortium.state / "up.json", json.dumps({"pid": os.getpid()}) + "\n")
        yield


def _left_by_up(consortium: Consortium) -> set[int]:
    return {*_marked(f"{MARK}={consortium.directory}"), *_doors_in(consortium.logs)}


def _served(consortium: Consortium) -> set[int]:
    return {*_marked(f"{SERVED}={consortium.directory}"), *_doors_in(consortium.state)}


def _marked(mark: str) -> Iterator[int]:
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile, or is another user's
            if mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                yield int(process.name)


def _doors_in(folder: Path) -> Iterator[int]:
    # nginx writes its title over its environment, and a worker, which keeps the port, names no file in it.
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (process / "comm").read_text().strip() == "nginx" and (process / "cwd").readlink() == folder:
                yield int(process.name)
