"""Lines on the terminal, printed as they are: a file name may look like markup."""

import sys
from typing import NoReturn

from rich.console import Console

out = Console(markup=False, highlight=False)
err = Console(stderr=True, markup=False, highlight=False)


def tell(line: str) -> None:
    """Print a line of results on stdout, however long it is."""
    out.print(line, soft_wrap=True)


def say(line: str) -> None:
    """Print a line about the run on stderr, however long it is."""
    err.print(line, soft_wrap=True)


def fail(message: str) -> NoReturn:
    """Say what was wrong and end with exit code 2."""
    say(f"error: {message}")
    sys.exit(2)
