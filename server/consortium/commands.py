"""The commands of a coordinator, `mmfm coordinator ...`. Heavy imports wait until a command needs them."""

import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from mmfm_core.errors import MmfmError

if TYPE_CHECKING:
    from server.consortium.settings import Consortium

START_SECONDS = 180.0

app = typer.Typer(
    help="Run federations across real hospitals: certificates, enrolment, Flower's server, runs.", no_args_is_help=True
)

Directory = Annotated[
    Path,
    typer.Option("--directory", "-d", envvar="MMFM_COORDINATOR", help="The coordinator's directory."),
]
HERE = Path("coordinator")
RunName = Annotated[str, typer.Argument(help="A run's name or directory.", show_default=False)]


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(help="A new directory.")] = HERE,
    name: Annotated[str, typer.Option(help="The consortium's name.")] = "consortium",
    address: Annotated[
        str, typer.Option(help="HOST[:PORT] as the sites dial it; 127.0.0.1 for a trial on this machine.")
    ] = "127.0.0.1",
) -> None:
    """Make a coordinator's directory: CA, server certificate, secrets, database place, settings."""
    from server.consortium.founding import found

    consortium = found(directory, name, address)
    _say(f"Coordinator '{name}' is in {directory}; sites will dial {consortium.settings.address}.")
    _say(f"Next: keep a copy of {consortium.keys / 'ca.key'} offline, then 'mmfm coordinator up'.")


@app.command()
def up(
    directory: Directory = HERE,
    detach: Annotated[bool, typer.Option("--detach", help="Return once everything is ready.")] = False,
) -> None:
    """Start Flower's server, the door and the monitor, wait until all are ready, and keep them running."""
    from server.consortium import services

    consortium = _open(directory)
    if not detach:
        services.up(consortium, _say, ready=lambda: None)
        return
    if services.running_pid(consortium) is not None:
        raise MmfmError(f"{directory}: this coordinator is up already; 'mmfm coordinator status' shows it")
    services.end_leftovers(consortium)
    services.check_ready(consortium)
    log = consortium.logs / "up.log"
    with log.open("ab") as output:
        began = output.tell()
        process = subprocess.Popen(  # noqa: S603 (our own words and paths)
            [Path(sys.executable).with_name("mmfm"), "coordinator", "up", "--directory", consortium.directory],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    end = time.monotonic() + START_SECONDS
    while " is up" not in (told := log.read_bytes()[began:].decode(errors="replace")):
        if process.poll() is not None or time.monotonic() > end:
            raise MmfmError(told.strip().removeprefix("error: ") or f"nothing started; see {consortium.logs}")
        time.sleep(0.2)
    _say(told.strip())


@app.command()
def down(directory: Directory = HERE) -> None:
    """End everything that `up` started. Runs that went on can be resumed."""
    from server.consortium import services

    ended = services.down(_open(directory))
    _say("The coordinator is down." if ended else "The coordinator was not up.")


@app.command()
def serve(
    program: Annotated[str, typer.Argument(help="superlink, superexec, door or monitor.", show_default=False)],
    directory: Directory = HERE,
) -> None:
    """Become one of the programs of `up`; for systemd and containers, which keep it running themselves."""
    consortium = _open(directory)
    if program == "monitor":
        from server.consortium.monitor import Monitor

        Monitor(consortium).serve()
    else:
        from server.consortium import services

        services.serve(consortium, program)


@app.command()
def status(directory: Directory = HERE) -> None:
    """Show whether the link is healthy, which sites are connected, and what runs do. Exit code 1 if it is not."""
    from server.consortium.showing import show_state
    from server.consortium.watching import look

    state = look(_open(directory))
    show_state(state, Console())
    if state.problem:
        raise MmfmError(state.problem)


@app.command()
def enrol(
    request: Annotated[Path, typer.Argument(help="The request file of a site.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", help="By default SITE.enrolment.json, here.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="The site has a new key; lock the old one out.")] = False,
    directory: Directory = HERE,
) -> None:
    """Let a site in, and write the one file that it joins with. Nothing in it is secret."""
    from mmfm_core.enrolment import Request, read
    from server.consortium import enrolling

    place = out or Path(f"{read(request, Request).site}.enrolment.json")
    enrolment = enrolling.enrol(_open(directory), request, place, replace=replace)
    _say(f"'{enrolment.site}' may connect. Send it {place}; there: mmfm site join {place.name}")


@app.command()
def revoke(
    site: Annotated[str, typer.Argument(help="The site's name.", show_default=False)], directory: Directory = HERE
) -> None:
    """Lock a site out, at once and for good; to come back it makes a new key and a new request."""
    from server.consortium import enrolling

    enrolling.revoke(_open(directory), site)
    _say(f"'{site}' is locked out.")


@app.command()
def certificate(
    renew: Annotated[bool, typer.Option("--renew", help="Make a new key and certificate for the server.")] = False,
    directory: Directory = HERE,
) -> None:
    """Show the server's certificate, or renew it; sites notice nothing, because they trust the CA."""
    from server.consortium import services
    from server.consortium.certificates import describe, issue
    from server.consortium.settings import host_and_port

    consortium = _open(directory)
    if renew:
        host, _ = host_and_port(consortium.settings.address)
        keys = consortium.keys
        issue(host, keys / "ca.key", consortium.authority, keys / "server.key", consortium.certificate)
    found = describe(consortium.certificate)
    _say(f"{consortium.certificate}: for {', '.join(found.hosts)}; valid until {found.not_after:%Y-%m-%d}")
    _say(f"{consortium.authority}: valid until {describe(consortium.authority).not_after:%Y-%m-%d}")
    if renew and services.restart_servers(consortium):
        _say("The link and the door start again with it; runs go on, and sites connect again by themselves.")


@app.command()
def run(
    federation: Annotated[Path, typer.Argument(help="The federation's document (YAML).", show_default=False)],
    run_directory: Annotated[Path | None, typer.Option("--run", help="By default DIRECTORY/runs/NAME.")] = None,
    follow: Annotated[bool, typer.Option(help="Show the progress; Ctrl-C stops the showing only.")] = True,
    replace: Annotated[bool, typer.Option("--replace", help="Delete the run in the way first.")] = False,
    directory: Directory = HERE,
) -> None:
    """Start a run over the sites that are enrolled; what is sent holds the document and no code."""
    from server.consortium import running

    consortium = _open(directory)
    begun = running.begin(consortium, federation, run_directory, replace=replace)
    _say(f"Run '{begun.facts['name']}' is in {begun.directory}")
    _say(f"Each site approves document {begun.facts['federation']}: mmfm site approve {federation.name}")
    if follow:
        _follow(consortium, begun.facts["name"], begun.directory)


@app.command()
def resume(
    run: RunName,
    follow: Annotated[bool, typer.Option(help="Show the progress; Ctrl-C stops the showing only.")] = True,
    directory: Directory = HERE,
) -> None:
    """Go on with a run that ended early, from its last checkpoint; or follow one that goes on."""
    from server.consortium import running

    consortium = _open(directory)
    resumed = running.resume(consortium, run)
    if follow:
        _follow(consortium, run, resumed.directory)


@app.command()
def stop(run: RunName, directory: Directory = HERE) -> None:
    """End a run; it can be resumed."""
    from server.consortium import running

    stopped = running.stop(_open(directory), run)
    _say(f"Run '{stopped.facts['name']}' is stopped; go on with 'mmfm coordinator resume {run}'")


@app.command("list")
def list_runs(directory: Directory = HERE) -> None:
    """List runs and their states."""
    from server.consortium.showing import show_runs
    from server.consortium.watching import look

    show_runs(look(_open(directory)), Console())


def _follow(consortium: "Consortium", name: str, run_directory: Path) -> None:
    from server.consortium import running
    from server.record import Run
    from server.report import write_report

    try:
        running.follow(consortium, Run(run_directory), Console())
    except KeyboardInterrupt:
        _say(f"The run goes on. 'mmfm coordinator resume {name}' shows it again, 'stop {name}' ends it.")
        raise
    finally:
        page = write_report(run_directory)
    _say(f"Report: {page}")


def _open(directory: Path) -> "Consortium":
    from server.consortium.settings import Consortium

    return Consortium.open(directory)


def _say(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
