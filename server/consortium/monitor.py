"""`/health` and `/metrics` for the operator's own monitoring, and one log of everything in JSON lines."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from server.consortium.settings import Consortium, host_and_port
from server.consortium.watching import State, look
from server.display import Tail

LOOK_SECONDS = 5.0
STALE_SECONDS = 60.0


class Monitor:
    """Looks every few seconds, and answers from the last look."""

    def __init__(self, consortium: Consortium) -> None:
        self._consortium = consortium
        self._state: State | None = None
        self._looked = time.monotonic()
        self._tails: dict[str, Tail] = {}

    def serve(self) -> None:
        """Look, log and answer, for ever."""
        monitor = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                code, kind, text = monitor.answer(self.path)
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                """Who asks how often is no news."""

        server = ThreadingHTTPServer(host_and_port(self._consortium.settings.monitor), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        while True:
            self.look()
            time.sleep(LOOK_SECONDS)

    def look(self) -> None:
        """Take note of the coordinator's state, and pass on what runs told since."""
        self._state, self._looked = look(self._consortium), time.monotonic()
        for run in self._state.runs:
            if run.directory not in self._tails:
                tail = self._tails[run.directory] = Tail(Path(run.directory) / "events.jsonl")
                if not run.active:
                    tail.lines()  # old news
            for event in self._tails[run.directory].lines():
                print(json.dumps({"run": run.name} | event, ensure_ascii=False), flush=True)

    def answer(self, path: str) -> tuple[int, str, str]:
        """Status, content type and text for a path."""
        state = self._state
        problem = "the monitor has not looked yet" if state is None else state.problem
        if time.monotonic() - self._looked > STALE_SECONDS:
            problem = f"the monitor has not looked for {STALE_SECONDS:g} s"
        if path == "/health":
            health = {"status": "down" if problem else "ok", "problem": problem}
            return (503 if problem else 200), "application/json", json.dumps(health) + "\n"
        if path == "/metrics" and state is not None:
            return 200, "text/plain; version=0.0.4", "".join(f"{line}\n" for line in metrics(state, problem is None))
        return 404, "text/plain", "known here: /health and /metrics\n"


def metrics(state: State, healthy: bool) -> Iterator[str]:
    """The state in Prometheus' text format."""
    now = time.time()
    yield from _gauge("mmfm_link_up", "Whether Flower's link answers.", [("", float(healthy))])
    yield from _gauge(
        "mmfm_certificate_days_left", "Until the server's certificate expires.", [("", state.certificate_days)]
    )
    yield from _gauge("mmfm_sites_enrolled", "Sites that may connect.", [("", float(len(state.sites)))])
    connected = [site.status == "online" for site in state.sites]
    yield from _gauge("mmfm_sites_connected", "Sites that are connected.", [("", float(sum(connected)))])
    names = [f'site="{site.name}"' for site in state.sites]
    yield from _gauge(
        "mmfm_site_connected",
        "Whether a site is connected.",
        [(name, float(here)) for name, here in zip(names, connected, strict=True)],
    )
    yield from _gauge(
        "mmfm_site_last_seen_seconds",
        "Since a site's last sign of life.",
        [
            (name, now - site.last_seen)
            for name, site in zip(names, state.sites, strict=True)
            if site.last_seen is not None
        ],
    )
    runs = [(f'run="{run.name}"', run) for run in state.runs]
    yield from _gauge("mmfm_run_round", "Rounds done.", [(label, float(run.round)) for label, run in runs])
    yield from _gauge("mmfm_run_rounds", "Rounds to do in all.", [(label, float(run.rounds)) for label, run in runs])
    yield from _gauge(
        "mmfm_run_status", "1 for the status it has.", [(f'{label},status="{run.status}"', 1.0) for label, run in runs]
    )
    yield from _gauge(
        "mmfm_run_seconds_since_round",
        "Since the last round that ended, while a run goes on.",
        [(label, now - run.round_ended) for label, run in runs if run.active],
    )
    yield from _gauge(
        "mmfm_run_void_rounds", "Rounds that came to nothing.", [(label, float(run.void)) for label, run in runs]
    )


def _gauge(name: str, text: str, values: list[tuple[str, float]]) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} gauge"
    for label, value in values:
        yield f"{name}{{{label}}} {value:g}" if label else f"{name} {value:g}"
