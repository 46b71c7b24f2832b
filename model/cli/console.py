"""Lines and tables on the terminal. Names from the user are printed verbatim: a file name may look like markup."""

import contextlib
import io
import sys
from typing import NoReturn

from rich.console import Console
from rich.table import Table

out = Console(markup=False, emoji=False, highlight=False)
err = Console(stderr=True, markup=False, emoji=False, highlight=False)


def print_any_name() -> None:
    """Let stdout and stderr print any file name: its original bytes in UTF-8, escapes in other encodings."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            utf8 = stream.encoding.lower().replace("-", "") == "utf8"
            stream.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")


def counted(number: int, noun: str) -> str:
    """For example "1 thread" or "2 threads"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def print_result(line: str) -> None:
    """Print a line of results on stdout, without wrapping."""
    print(line, flush=True)


def show(table: Table) -> None:
    """Print a table on stdout at its full width: a narrow terminal wraps lines, but no number is truncated."""
    wide = out.options.update(width=10_000)
    out.width = max(out.width, out.measure(table, options=wide).maximum)
    out.print(table)


def print_status(line: str) -> None:
    """Print a line about the run on stderr, without wrapping. It is lost if the terminal has been closed."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def fail(message: str) -> NoReturn:
    """Print an error and exit with code 2."""
    print_status(f"error: {message}")
    try:
        print(end="", flush=True)
    except OSError:  # on exit, Python would try to flush stdout again, report that too, and change the code to 120
        with contextlib.suppress(OSError):
            sys.stdout.close()
    sys.exit(2)
