"""Flower's SuperLink with a patient database: `flower-superlink` by another way in, with the same options.

Flower waits 5 seconds for its SQLite database, and then answers with an error that ends the run. A model of 500 MB is
written for longer than that on an ordinary disk.
"""

import sys

from flwr.supercore import constant

BUSY_SECONDS = 300


def main() -> None:
    """Run it."""
    waits = {"busy_timeout": str(BUSY_SECONDS * 1000)}
    constant.SQLITE_PRAGMAS = tuple((name, waits.get(name, value)) for name, value in constant.SQLITE_PRAGMAS)
    from flwr.superlink.cli import flower_superlink  # reads them when it is imported

    sys.argv[0] = "flower-superlink"
    flower_superlink()


if __name__ == "__main__":
    main()
