"""How long a site is waited for: to the deadline, and less after it let one pass, so that the others need not wait."""

SHORTEST = 30.0  # seconds; Flower's node looks for work every 3 s, and starts a process for each message


class Patience:
    """The deadline of each node's next question.

    Who let a deadline pass is next asked for twice as long as its last answer took. So a site that hangs costs the
    others little, a site that is always slow keeps its time, and who answers in time again is waited for as before.
    """

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._took: dict[int, float] = {}
        self._late: set[int] = set()

    def seconds(self, node: int) -> float:
        """How long to wait for a node's answer."""
        if node in self._late and node in self._took:
            return min(self._deadline, max(SHORTEST, 2 * self._took[node]))
        return self._deadline

    def answered(self, node: int, seconds: float) -> None:
        """Take note of an answer, whatever it says."""
        self._took[node] = seconds
        self._late.discard(node)

    def silent(self, node: int) -> None:
        """Take note that none came in time."""
        self._late.add(node)
