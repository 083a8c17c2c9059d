"""The hospital's commands, `mmfm site ...`. Heavy imports wait until a command needs them."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from client.place import Place
from mmfm_core.process import importing, one_thread

site = typer.Typer(
    name="site",
    help="A hospital's side: join a consortium, decide what may run and leave, and run the agent.",
    no_args_is_help=True,
    add_completion=False,
)

Directory = Annotated[
    Path, typer.Option("--directory", "-d", envvar="MMFM_SITE", help="The site's directory, the agent's alone.")
]
Relay = Annotated[
    Path | None,
    typer.Option(
        "--relay", help="The folder with the relay's key and certificate; by default 'relay' in the directory."
    ),
]
Socket = Annotated[
    Path | None,
    typer.Option(
        "--socket", help="Where agent and relay meet; by default 'agent.sock' in the directory, or the units'."
    ),
]
HERE = Path()

egress = typer.Typer(help="What left this site: a log that can be checked offline.", no_args_is_help=True)
site.add_typer(egress, name="egress")
ledger = typer.Typer(help="What this site's patients have paid in private federations.", no_args_is_help=True)
site.add_typer(ledger, name="ledger")


@site.command()
def init(
    directory: Annotated[
        Path, typer.Argument(help="The site's directory, made if it is not there.", show_default=False)
    ],
    name: Annotated[str, typer.Option(help="The site's name in the consortium.", show_default=False)],
    relay: Relay = None,
) -> None:
    """Make a site: its private key, which never leaves, a commented site.yaml, and a request for the coordinator."""
    from client.enrol import init as make

    place = Place.of(directory, relay)
    request = make(place, name)
    _say(f"Request: {request}; send it to the coordinator, over any channel. It holds no secret.")
    _say(
        f"Key: {place.key}; it stays here. Describe this hospital's data in {place.directory / 'site.yaml'} meanwhile."
    )
    _say("Next, with the coordinator's answer: mmfm site join ANSWER")


@site.command()
def join(
    bundle: Annotated[Path, typer.Argument(help="The enrolment that the coordinator sent.", show_default=False)],
    directory: Directory = HERE,
    relay: Relay = None,
) -> None:
    """Take the coordinator's answer: where to connect, and whom to trust there. It holds no code."""
    from client.enrol import join as take

    joined = take(Place.of(directory, relay), bundle)
    _say(f"{joined.site} belongs to {joined.consortium}; its relay will connect to {joined.address} and nowhere else.")
    _say("Next: mmfm site check")


@site.command()
def check(
    directory: Directory = HERE,
    relay: Relay = None,
    agent_only: Annotated[bool, typer.Option("--agent-only", help="Only what the agent needs; no network.")] = False,
    relay_only: Annotated[bool, typer.Option("--relay-only", help="Only what the relay needs; no data.")] = False,
) -> None:
    """Check what taking part needs: versions, data, disk, memory, a training step, the network, TLS and the clock."""
    from itertools import chain

    from client.checks import check_site
    from client.reach import check_relay

    one_thread()
    place, failed = Place.of(directory, relay), False
    for finding in chain(() if relay_only else check_site(place), () if agent_only else check_relay(place)):
        failed |= finding.level == "failed"
        _say(f"{finding.level:8} {finding.text}")
    if failed:
        raise typer.Exit(1)


@site.command()
def approve(
    federation: Annotated[
        Path, typer.Argument(help="The document; its pinned files lie beside it.", show_default=False)
    ],
    directory: Directory = HERE,
    yes: Annotated[bool, typer.Option("--yes", help="Approve without being asked.")] = False,
) -> None:
    """Show in words what a document would run, read and send from here, and approve it. This is consent: read it."""
    one_thread()
    with importing():
        from client.approval import approve as agree
        from client.approval import propose, sentences

    place = Place.of(directory)
    proposal = propose(place, federation)
    for sentence in sentences(proposal):
        _say(sentence)
    if not yes and not typer.confirm("Approve it?"):
        _say("Not approved; nothing was written.")
        raise typer.Exit(1)
    agree(place, proposal)
    _say(f"Approved: {proposal.document}. Withdraw it with: mmfm site revoke {proposal.document[:12]}")


@site.command()
def revoke(
    document: Annotated[str, typer.Argument(help="The document's hash, or its beginning.", show_default=False)],
    directory: Directory = HERE,
) -> None:
    """Withdraw an approval: the agent refuses the document from the next message on."""
    from client.approval import revoke as withdraw

    _say(f"Revoked: {withdraw(Place.of(directory), document)}. What left already stands in the egress log.")


@site.command()
def status(directory: Directory = HERE, relay: Relay = None, socket: Socket = None) -> None:
    """Show what this site approved, what it did last, whether its agent is there, and the egress log's head."""
    from client.status import lines

    for line in lines(Place.of(directory, relay, socket)):
        _say(line)


@egress.command()
def show(
    directory: Directory = HERE,
    last: Annotated[int, typer.Option(min=1, help="So many of the newest entries.")] = 20,
    json: Annotated[bool, typer.Option("--json", help="Whole entries, one JSON object a line.")] = False,
) -> None:
    """Show what left this site: when, for which document and round, which tensors, figures and counts."""
    from client.status import shown

    for line in shown(Place.of(directory), last, json):
        _say(line)


@egress.command()
def verify(
    directory: Directory = HERE,
    noted: Annotated[
        str | None, typer.Option(help="A head that you noted elsewhere: sees a cut or rewritten end.")
    ] = None,
) -> None:
    """Check offline that no entry of the egress log was changed, removed, inserted or moved, and print its head."""
    from client.status import log_of

    number, head = log_of(Place.of(directory)).verify(noted)
    _say(f"{number} entries, each as it was written. Head: {head}")
    if noted is None:
        _say("An end that was cut off leaves a whole chain: note this head elsewhere, and give it next time (--noted).")


@ledger.command("show")
def show_ledger(directory: Directory = HERE) -> None:
    """Show what this site's patients have paid in private federations, and what is left of the budget."""
    from client.spending import shown

    for line in shown(Place.of(directory)):
        _say(line)


@ledger.command("verify")
def verify_ledger(directory: Directory = HERE) -> None:
    """Check offline that no line of the ledger was changed, removed or inserted, and print the last one's hash."""
    from client.spending import verified

    _say(verified(Place.of(directory)))


@ledger.command("export")
def export_ledger(
    out: Annotated[Path, typer.Argument(help="The JSON file to write.", show_default=False)],
    directory: Directory = HERE,
) -> None:
    """Write the whole ledger as JSON, with its hashes. It holds no patient: documents, rounds and what they cost."""
    from client.spending import export

    _say(f"{out}: {export(Place.of(directory), out)} lines")


@site.command()
def run(
    directory: Directory = HERE,
    agent_only: Annotated[bool, typer.Option("--agent-only", help="Only the process that sees patients.")] = False,
    relay_only: Annotated[bool, typer.Option("--relay-only", help="Only the process that has the network.")] = False,
    relay: Relay = None,
    socket: Socket = None,
) -> None:
    """Run the site until it is stopped. Without options both processes are this user's: for a trial, not for patients.

    A hospital runs them as two users, from the units in deploy/systemd: the agent without network, the relay without
    access to data.
    """
    from mmfm_core.errors import MmfmError

    place = Place.of(directory, relay, socket)
    if agent_only and relay_only:
        raise MmfmError("--agent-only and --relay-only exclude each other; give one, or none for both")
    if agent_only:
        from client.serve import serve

        serve(place)
    from client.running import run as keep_running

    keep_running(place, agent=not relay_only, relay=True)


def _say(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
