"""The one exception that is meant to be read by a person."""


class MmfmError(Exception):
    """Something the user can mend.

    The message is one sentence that names the file, the field and the remedy, and holds no value read from a patient's
    record: it may be shown on a screen, written to a log or sent to the coordinator.
    """
