"""`mmfm audit`: attacks on a document's privacy, and whether what they find is within what it promises."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from mmfm_core.config import Federation, load_federation
from mmfm_core.errors import MmfmError
from mmfm_core.privacy.accounting import Charge, schedule_of
from mmfm_core.privacy.audit import inversion, membership
from mmfm_core.privacy.audit.bound import CONFIDENCE
from mmfm_core.privacy.step import Mechanism
from mmfm_core.storage import write_json
from server.one_run import OneRun, one_run
from server.privacy import steps_of

Told = Callable[[int, int], None]

_SURE = 3.0  # standard errors by which an area must be beyond what is allowed


@dataclass(frozen=True)
class Finding:
    """One attack's result.

    Attributes:
        found, allowed: with their names and units, as people read them.
        verdict: one sentence.
        broken: whether the promise is.
        figures: all numbers behind it, by name.
    """

    attack: str
    found: str
    allowed: str
    verdict: str
    broken: bool
    figures: dict[str, float | int | None]


def audit(path: Path, canaries: int, models: int, json: Path | None, console: Console) -> bool:
    """Carry out the command; returns whether everything found is within what the document promises.

    Raises:
        MmfmError: the document is wrong, or its settings cannot be audited.
    """
    federation = load_federation(path)
    if not any(stage.federated for stage in federation.stages):
        raise MmfmError(f"{path}: no stage is federated, so that nothing leaves a site; there is nothing to attack")
    charge = schedule_of(federation) if federation.privacy else None
    findings = []
    for title, attack in attacks(federation, charge, canaries, models).items():
        with _progress(console, title) as told:
            findings.append(attack(told))
    console.print(table(federation, charge, findings))
    sound = not any(finding.broken for finding in findings)
    console.print(_summary(federation, sound), highlight=False, markup=False, soft_wrap=True)
    if json:
        settings = None if charge is None else asdict(charge)
        write_json(json, {"sound": sound, "settings": settings, "findings": [asdict(each) for each in findings]})
    return sound


def attacks(
    federation: Federation, charge: Charge | None, canaries: int, models: int
) -> dict[str, Callable[[Told], Finding]]:
    """The three attacks on a document, by what they are called while they run."""

    def of_one_run(told: Told) -> Finding:
        return _one_run(one_run(federation, canaries, told))

    def of_membership(told: Told) -> Finding:
        each = membership.PATIENTS // 2  # in each model, as far as is known
        found = membership.attack(steps_of(federation), _mechanism(federation, charge, each), models, told)
        return _membership(found, membership.allowed(charge))

    def of_inversion(told: Told) -> Finding:
        return _inversion(inversion.attack(_mechanism(federation, charge, 1, always=True)), federation)

    return {"one-run audit": of_one_run, "membership inference": of_membership, "gradient inversion": of_inversion}


def _mechanism(federation: Federation, charge: Charge | None, patients: int, always: bool = False) -> Mechanism | None:
    if charge is None:
        return None
    privacy = federation.privacy
    assert privacy
    rate = 1.0 if always else charge.rate
    return Mechanism(charge.noise, privacy.max_grad_norm, rate, patients, privacy.views, privacy.engine)


def _one_run(audited: OneRun) -> Finding:
    found, promised = audited.found, audited.promised
    shown = f"ε > {found.epsilon:.2f} ({found.correct} of {found.guesses} guesses right)"
    figures = {
        "lower_epsilon": found.epsilon,
        "highest_that_can_be_seen": found.highest,
        "promised_epsilon": promised,
        "delta": audited.delta,
        "correct": found.correct,
        "guesses": found.guesses,
        "confidence": CONFIDENCE,
    }
    broken = promised is not None and found.epsilon > promised
    if promised is None:
        allowed, verdict = "any", "nothing is promised, and who was there is found out"
    else:
        allowed = f"ε ≤ {promised:.2f} by the ledger, δ {audited.delta:g}"
        verdict = "BROKEN: more leaves than the ledger says" if broken else "within what the ledger says"
        if not broken and found.highest <= promised:
            verdict += f"; with so few --canaries nothing above ε {found.highest:.1f} can be seen"
    return Finding("one-run audit (Steinke et al. 2023)", shown, allowed, verdict, broken, figures)


def _membership(found: membership.Membership, most: membership.Membership) -> Finding:
    share = f"{membership.FALSE_POSITIVES:.0%} false positives"
    broken = found.area - _SURE * found.error > most.area
    verdict = "within what the schedule allows"
    if broken:
        verdict = "BROKEN: members are told from others better than any attack should"
    elif most.area == 1:
        verdict = "nothing is promised"
    if not broken and found.area - _SURE * found.error <= 0.5:
        verdict += "; no better than chance"
    return Finding(
        "membership inference (LiRA, Carlini et al. 2022)",
        f"AUC {found.area:.3f} ± {found.error:.3f}, {found.found:.1%} found at {share}",
        f"AUC ≤ {most.area:.3f}, {most.found:.1%} at {share}",
        verdict,
        broken,
        {
            "auc": found.area,
            "auc_standard_error": found.error,
            "auc_allowed": most.area,
            "found": found.found,
            "found_allowed": most.found,
            "false_positives": membership.FALSE_POSITIVES,
        },
    )


def _inversion(found: inversion.Inversion, federation: Federation) -> Finding:
    if found.found >= inversion.RECOGNISED:
        verdict = "a patient's image can be read out of a message"
    elif found.found > found.guess + 1:
        verdict = "something of a patient's image shows in a message"
    else:
        verdict = "no better than what a message about another patient gives"
    said = f"PSNR {found.found:.1f} dB, from another patient's message {found.guess:.1f} dB"
    allowed = "no figure follows from ε" if federation.privacy else "any"
    return Finding(
        "gradient inversion (one patient, first layer)",
        said,
        allowed,
        verdict,
        False,
        {"psnr": found.found, "psnr_of_a_guess": found.guess},
    )


def table(federation: Federation, charge: Charge | None, findings: Sequence[Finding]) -> Table:
    """A row for each attack."""
    title = f"Attacks on '{federation.name}' without privacy"
    if charge:
        assert federation.privacy
        title = (
            f"Attacks on '{federation.name}': {charge.steps} steps, noise multiplier {charge.noise:g}, sampling rate "
            f"{charge.rate:g}, clipped to {federation.privacy.max_grad_norm:g}"
        )
    shown = Table(title=title, title_justify="left")
    for column in ("attack", "found", "allowed", "verdict"):
        shown.add_column(column, overflow="fold")
    for each in findings:
        shown.add_row(each.attack, each.found, each.allowed, each.verdict)
    return shown


def _summary(federation: Federation, sound: bool) -> str:
    if not federation.privacy:
        return "This document has no 'privacy': whoever sees its messages can learn what the attacks found."
    if not sound:
        return (
            "An attack found more than the document promises: do not train on patients, and report this with the table "
            f"above. (By chance alone the one-run audit says so in fewer than {1 - CONFIDENCE:.0%} of audits.)"
        )
    return (
        "No attack found more than the document promises. That is no proof of the promise; the accountants have it, "
        "and the audit would show most mistakes between them and what leaves a site."
    )


@contextmanager
def _progress(console: Console, title: str) -> Iterator[Told]:
    """A bar in a terminal; elsewhere one line."""
    if not console.is_terminal or console.is_dumb_terminal:
        console.print(f"{title} ...", highlight=False)
        yield lambda done, of: None
        return
    columns = (TextColumn("{task.description:<22}"), BarColumn(bar_width=20), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(title, total=None)
        yield lambda done, of: bars.update(task, completed=done, total=of)
