"""A coordinator's state as tables for people."""

import time

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from server.consortium.watching import State
from server.display import duration

RENEW_DAYS = 30


def show_state(state: State, console: Console) -> None:
    """The link, the certificate, every site, every run."""
    console.print(f"Link: {'does not answer' if state.problem else 'healthy'}", highlight=False)
    left = f"expires in {state.certificate_days:.0f} days"
    if state.certificate_days < RENEW_DAYS:
        left += "; renew it with 'mmfm coordinator certificate --renew'"
    console.print(f"Certificate: {left}", highlight=False, soft_wrap=True)
    table = Table("site", "state", "last seen", box=None)
    for site in state.sites:
        table.add_row(site.name, site.status, "never" if site.last_seen is None else _ago(site.last_seen))
    console.print(table if state.sites else "No site is enrolled.", highlight=False)
    show_runs(state, console)


def show_runs(state: State, console: Console) -> None:
    """Every run; why those failed that did, and where they are."""
    table = Table("run", "state", "round", "last round", "void", box=None)
    for run in state.runs:
        table.add_row(run.name, run.status, f"{run.round}/{run.rounds}", _ago(run.round_ended), str(run.void))
    console.print(table if state.runs else "No run yet.", highlight=False)
    for run in state.runs:
        if run.cause:
            console.print(f"{run.name}: {escape(run.cause)}", highlight=False, soft_wrap=True)


def _ago(moment: float) -> str:
    return f"{duration(max(time.time() - moment, 0))} ago"
