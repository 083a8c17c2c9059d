"""What a site keeps for itself: its local parameters, by federation and round."""

import re
from pathlib import Path

from mmfm_core.storage import Tensors, read_tensors, write_tensors

KEPT_ROUNDS = 3  # a coordinator goes back to its last checkpoint but one at most, and that round starts from one more


class LocalState:
    """Local tensors after each of the last rounds, one file a round, in a folder of the site.

    A round is always started from the state before it, so that a repeated round gives the same answer.
    """

    def __init__(self, folder: Path, durable: bool = True) -> None:
        self.folder, self._durable = folder, durable

    def before(self, round_number: int) -> Tensors:
        """The local tensors to start a round from; empty before the first."""
        earlier = [number for number in self._rounds() if number < round_number]
        return read_tensors(self._path(max(earlier))) if earlier else {}

    def save(self, round_number: int, tensors: Tensors) -> None:
        """Keep the local tensors after a round, and drop what no repeated round can need."""
        rounds = sorted(self._rounds())
        if not tensors and not rounds:
            return  # nothing is local, and a file for each round would say only that
        write_tensors(self._path(round_number), tensors, self._durable)
        rounds = sorted({*rounds, round_number})
        needed = [number for number in rounds if number <= round_number][-KEPT_ROUNDS:]  # a site may miss rounds
        for number in set(rounds) - set(needed):
            self._path(number).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"round-{number:05d}.safetensors"

    def _rounds(self) -> list[int]:
        names = (re.fullmatch(r"round-(\d+)\.safetensors", path.name) for path in self.folder.glob("round-*"))
        return [int(name.group(1)) for name in names if name]
