"""A private round at a site: paid for before it trains, and answered once; the same question has the same answer."""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from mmfm_core.config.federation import Federation
from mmfm_core.config.privacy import Privacy
from mmfm_core.config.rounds import Round
from mmfm_core.config.site import Budget
from mmfm_core.errors import MmfmError
from mmfm_core.privacy.accounting import Charge, schedule_of
from mmfm_core.privacy.ledger import Ledger, Limit
from mmfm_core.privacy.step import Mechanism
from mmfm_core.protocol import RoundReply, RoundRequest
from mmfm_core.storage import digest, read_tensors, whole_folder, write_tensors, write_text

LEDGER = "ledger.sqlite"
"""Its name in a site's directory, unless `site.yaml` names another place."""

KEPT_ANSWERS = 2  # a coordinator that was killed asks for the round after its last checkpoint but one at most


def holder_of(answers: Path) -> str:
    """Whose the rounds answered from this folder are, in a ledger that other directories may share; made once."""
    path = answers / "holder"
    if not path.is_file():
        write_text(path, secrets.token_hex(8))
    return path.read_text()


@dataclass(frozen=True)
class PrivateRounds:
    """The rounds of one private document at a site.

    Attributes:
        schedule: noise and rate of every step, and how many there are in all.
        budget: of the site's patients, over all documents.
        answers: the folder of the last answers. Nothing in it has not left, or was not about to leave, the site.
    """

    document: str
    privacy: Privacy
    schedule: Charge
    budget: Budget
    ledger: Ledger
    answers: Path

    @classmethod
    def of(
        cls, federation: Federation, document: str, budget: Budget, ledger: Ledger, answers: Path
    ) -> "PrivateRounds":
        """Those of a document that has `privacy`.

        Raises:
            MmfmError: see `schedule_of`.
        """
        assert federation.privacy
        return cls(document, federation.privacy, schedule_of(federation), budget, ledger, answers)

    def mechanism(self, patients: int) -> Mechanism:
        """How each step is made private, at a site that tells it has so many training patients."""
        p = self.privacy
        return Mechanism(self.schedule.noise, p.max_grad_norm, p.rate, patients, p.views, p.engine)

    def charge(self, this: Round) -> Charge | None:
        """What a round costs each patient; None where nothing that it sends is of a patient."""
        if this.stage and this.returns_tensors:
            return Charge(self.schedule.noise, self.schedule.rate, this.stage.local_steps)
        tells = self.privacy.figures == "noised" and "test" in this.evaluates
        return Charge(self.privacy.figure_noise, 1.0, 1) if tells else None

    def answered(self, request: RoundRequest) -> RoundReply | None:
        """The answer that a round had before; None where it has to be computed.

        Raises:
            MmfmError: the round was answered from another state.
        """
        folder = self._folder(request.round)
        if not folder.is_dir():
            return None
        if (folder / "question").read_text() != digest(request.tensors):
            raise MmfmError(f"round {request.round} was answered before, from another state; a round is paid for once")
        self.ledger.release(self.document, request.round)  # had it been cut off before
        reply = TypeAdapter(RoundReply).validate_json((folder / "reply.json").read_bytes())
        return replace(reply, tensors=read_tensors(folder / "reply.safetensors"))

    def reserve(self, this: Round) -> None:
        """Pay for a round.

        Raises:
            MmfmError: see `Ledger.reserve`; or rounds were answered here that the ledger does not know.
        """
        if any(self.answers.parent.glob("*/round-*")) and all(
            entry.holder != self.ledger.holder for entry in self.ledger.entries()
        ):
            raise MmfmError(
                "the ledger has no line of the private rounds that were answered here: it was lost, or is another one; "
                "restore it from a backup, for until then no private round is answered",
                str(self.ledger.path),
            )
        charge = self.charge(this)
        assert charge
        budget = Limit(self.budget.epsilon, self.budget.delta, "the budget of this site")
        planned = Limit(self.privacy.epsilon, self.privacy.delta, "what the document may cost")
        self.ledger.reserve(self.document, this.number, charge, budget, planned)

    @contextmanager
    def paid(self, this: Round) -> Iterator[None]:
        """Inside the block the round is paid for; it is not if the block fails, as then nothing comes of it.

        Raises:
            MmfmError: see `Ledger.reserve`.
        """
        self.reserve(this)
        try:
            yield
        except Exception:
            self.ledger.withdraw(self.document, this.number)
            raise

    def keep(self, request: RoundRequest, reply: RoundReply) -> RoundReply:
        """Keep an answer, note that it leaves, and return it with what the document has cost by now."""
        spent = self.ledger.spent(self.privacy.delta, self.document)
        reply = replace(reply, epsilon=spent)
        with whole_folder(self._folder(request.round)) as folder:
            write_text(folder / "question", digest(request.tensors))
            write_text(folder / "reply.json", TypeAdapter(RoundReply).dump_json(reply, exclude={"tensors"}).decode())
            write_tensors(folder / "reply.safetensors", reply.tensors)
        self.ledger.release(self.document, request.round)
        for old in sorted(self.answers.glob("round-*"))[:-KEPT_ANSWERS]:
            shutil.rmtree(old)
        return reply

    def _folder(self, number: int) -> Path:
        return self.answers / f"round-{number:05d}"
