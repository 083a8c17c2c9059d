"""The one exception that is meant to be read by a person."""


class MmfmError(Exception):
    """Something the user can mend.

    The message is one sentence that names the file, the field and the remedy, and holds no value read from a patient's
    record: it may be shown on a screen or written to a site's own log.

    Attributes:
        told: what a site may send to its coordinator: the message without `where`, the file and row it is about, and
            without what only the site's own people may see.
    """

    def __init__(self, text: str, where: str = "", told: str | None = None) -> None:
        super().__init__(f"{where}: {text}" if where else text)
        self.told = text if told is None else told
