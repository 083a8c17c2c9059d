"""The ledger: it says no before a budget is exceeded, forgets nothing, and shows when it was tampered with."""

import multiprocessing
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from mmfm_core.errors import MmfmError
from mmfm_core.privacy.accounting import Charge, composed, epsilon
from mmfm_core.privacy.ledger import Ledger, Limit

ONE, OTHER = "a" * 64, "b" * 64
ROUND = Charge(1.1, 0.02, 50)
BUDGET = Limit(3.0, 1e-5, "the budget of this site")
ANY = Limit(100.0, 1e-5, "what the document may cost")


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.db")


def take(ledger: Ledger, document: str, number: int, charge: Charge = ROUND) -> None:
    ledger.reserve(document, number, charge, BUDGET, ANY)
    ledger.release(document, number)


def rounds_granted(ledger: Ledger, document: str) -> int:
    for number in range(1, 100):
        try:
            take(ledger, document, number)
        except MmfmError as error:
            assert "the budget of this site is ε 3; nothing was computed" in str(error)
            return number - 1
    raise AssertionError("no round was refused")


def test_rounds_are_granted_up_to_the_budget_and_not_one_more(ledger: Ledger) -> None:
    """As many as accounting says of all steps together, counted here in one piece."""
    granted = rounds_granted(ledger, ONE)
    assert epsilon(1.1, 0.02, 50 * granted, 1e-5) <= 3.0 < epsilon(1.1, 0.02, 50 * (granted + 1), 1e-5)
    assert ledger.spent(1e-5) == pytest.approx(epsilon(1.1, 0.02, 50 * granted, 1e-5))


def test_another_document_draws_on_the_same_budget_and_a_smaller_round_may_still_fit(ledger: Ledger) -> None:
    rounds_granted(ledger, ONE)
    with pytest.raises(MmfmError, match="nothing was computed"):
        take(ledger, OTHER, 1)
    take(ledger, OTHER, 1, Charge(4.0, 0.01, 10))
    assert ledger.spent(1e-5, OTHER) == pytest.approx(epsilon(4.0, 0.01, 10, 1e-5))
    assert ledger.spent(1e-5) <= 3.0


def test_a_document_has_a_limit_of_its_own(ledger: Ledger) -> None:
    planned = Limit(epsilon(1.1, 0.02, 100, 1e-5) + 1e-9, 1e-5, "what the document may cost")
    for number in (1, 2):
        ledger.reserve(ONE, number, ROUND, BUDGET, planned)
        ledger.release(ONE, number)
    with pytest.raises(MmfmError, match="what the document may cost"):
        ledger.reserve(ONE, 3, ROUND, BUDGET, planned)
    take(ledger, OTHER, 1)


def test_a_released_round_is_never_taken_again(ledger: Ledger) -> None:
    take(ledger, ONE, 1)
    with pytest.raises(MmfmError, match="round 1 was answered before"):
        ledger.reserve(ONE, 1, ROUND, BUDGET, ANY)
    with pytest.raises(MmfmError, match="round 1 is not reserved"):
        ledger.withdraw(ONE, 1)


def test_what_was_cut_off_stays_charged_and_may_be_taken_again_until_a_later_round_was(ledger: Ledger) -> None:
    ledger.reserve(ONE, 1, ROUND, BUDGET, ANY)
    spent = ledger.spent(1e-5)
    assert spent == pytest.approx(epsilon(1.1, 0.02, 50, 1e-5))
    ledger.reserve(ONE, 1, ROUND, BUDGET, ANY)
    assert ledger.spent(1e-5) == spent
    take(ledger, ONE, 2)
    with pytest.raises(MmfmError, match="a round after 1 was taken"):
        ledger.reserve(ONE, 1, ROUND, BUDGET, ANY)


def test_a_round_that_failed_is_withdrawn_and_can_be_reserved_anew(ledger: Ledger) -> None:
    ledger.reserve(ONE, 1, ROUND, BUDGET, ANY)
    ledger.withdraw(ONE, 1)
    assert ledger.spent(1e-5) == 0
    with pytest.raises(MmfmError, match="round 1 is not reserved; nothing may leave"):
        ledger.release(ONE, 1)
    take(ledger, ONE, 1)
    assert ledger.spent(1e-5) == pytest.approx(epsilon(1.1, 0.02, 50, 1e-5))


def test_holders_of_one_ledger_pay_each_for_their_own_answer(tmp_path: Path) -> None:
    """Two directories of the same patients: whatever one was charged, the other does not ride along."""
    one, other = (Ledger(tmp_path / "ledger.db", holder) for holder in ("one", "other"))
    one.reserve(ONE, 1, ROUND, BUDGET, ANY)
    take(other, ONE, 1)
    twice = composed([ROUND, ROUND], 1e-5)
    assert one.spent(1e-5) == other.spent(1e-5) == pytest.approx(twice)
    with pytest.raises(MmfmError, match="round 2 is not reserved"):
        other.reserve(ONE, 2, ROUND, BUDGET, ANY)
        one.release(ONE, 2)
    one.release(ONE, 1)
    with pytest.raises(MmfmError, match="round 1 was answered before"):
        one.reserve(ONE, 1, ROUND, BUDGET, ANY)
    planned = Limit(twice, 1e-5, "what the document may cost")
    with pytest.raises(MmfmError, match="what the document may cost"):
        one.reserve(ONE, 2, ROUND, BUDGET, planned)


def test_a_ledger_whose_folder_is_gone_is_not_begun_anew(tmp_path: Path) -> None:
    with pytest.raises(MmfmError, match="the ledger cannot be used"):
        take(Ledger(tmp_path / "unmounted" / "ledger.db"), ONE, 1)
    assert not (tmp_path / "unmounted").exists()


def test_what_was_never_reserved_cannot_leave(ledger: Ledger) -> None:
    with pytest.raises(MmfmError, match="round 4 is not reserved; nothing may leave"):
        ledger.release(ONE, 4)


def tamper(ledger: Ledger, statement: str) -> None:
    """As somebody with the file and a database tool would, who took the triggers away first."""
    with closing(sqlite3.connect(ledger.path)) as database:
        database.executescript(f"DROP TRIGGER no_change; DROP TRIGGER no_removal; {statement}; PRAGMA wal_checkpoint")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET steps = 1 WHERE number = 3",
        "UPDATE entries SET noise = noise * 1.0000001 WHERE number = 1",
        "UPDATE entries SET kind = 'withdrawn' WHERE number = 4",
        "DELETE FROM entries WHERE number = 2",
        "DELETE FROM entries WHERE number <= 2",
        "UPDATE entries SET number = 99 WHERE number = 6",
        "INSERT INTO entries SELECT 7, time, 'withdrawn', document, round, holder, noise, rate, steps, hash, 'x' "
        "FROM entries WHERE number = 6",
        "UPDATE entries SET holder = 'another' WHERE number = 6",
    ],
)
def test_a_tampered_ledger_answers_nothing(ledger: Ledger, statement: str) -> None:
    for number in (1, 2, 3):
        take(ledger, ONE, number)
    tamper(ledger, statement)
    for use in (ledger.entries, lambda: take(ledger, ONE, 4), lambda: ledger.spent(1e-5)):
        with pytest.raises(MmfmError, match="was changed, or one before it is missing"):
            use()


@pytest.mark.parametrize("statement", ["UPDATE entries SET steps = 1", "DELETE FROM entries"])
def test_the_database_itself_refuses_changes(ledger: Ledger, statement: str) -> None:
    take(ledger, ONE, 1)
    with closing(sqlite3.connect(ledger.path)) as database, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        database.execute(statement)


def test_a_damaged_file_is_no_empty_ledger(ledger: Ledger) -> None:
    ledger.path.write_bytes(b"this is no database at all" * 100)
    with pytest.raises(MmfmError, match="the ledger cannot be used"):
        take(ledger, ONE, 1)


def _take_many(path: Path, document: str) -> None:
    ledger = Ledger(path)
    for number in range(1, 12):
        try:
            take(ledger, document, number)
        except MmfmError:
            return


@pytest.mark.slow
def test_agents_side_by_side_do_not_overspend_together(ledger: Ledger) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_take_many, args=(ledger.path, letter * 64)) for letter in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    standing = [entry for entry in ledger.entries() if entry.kind == "released"]
    assert len({(entry.document, entry.round) for entry in standing}) == len(standing) >= 13
    assert composed([entry.charge for entry in standing], 1e-5) <= 3.0
