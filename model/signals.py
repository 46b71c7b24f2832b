"""Ctrl-C, SIGTERM and SIGHUP (a closed terminal). During training they are deferred to the end of the step."""

import contextlib
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

NOTICE = b"stopping after the current step; a second signal stops at once\n"
SAME_SECONDS = 0.5
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(BaseException):
    """A signal asked the program to stop. Not an Exception, so that no library handles it as an error.

    Attributes
    ----------
    signal : int
        SIGINT, SIGTERM or SIGHUP.
    note : str
        Text to append to the message for the user.
    """

    def __init__(self, signal: int, note: str = "") -> None:
        super().__init__(signal, note)
        self.signal = signal
        self.note = note


@contextmanager
def stoppable() -> Iterator[None]:
    """Within the block, a signal raises `Stopped`."""
    with _handled_by(lambda number, frame: stop(number)):
        yield


@contextmanager
def stoppable_between_steps() -> Iterator[list[int]]:
    """Within the block, the first signal is appended to the list that this yields; a second raises `Stopped`.

    A second signal within half a second counts as the same one: ``timeout`` and some process managers signal both the
    process and its group.
    """
    received: list[int] = []
    first = math.inf  # until set: a second signal may arrive while the first is being handled

    def handle(number: int, frame: Any) -> None:
        nonlocal first
        if not received:
            received.append(number)
            first = time.monotonic()
            with contextlib.suppress(OSError):  # not through the console: this thread may hold its lock
                os.write(2, b"\n" * os.isatty(2) + NOTICE)
        elif time.monotonic() - first > SAME_SECONDS:
            stop(number)

    with _handled_by(handle):
        yield received


def stop(number: int, note: str = "") -> NoReturn:
    """Raise `Stopped`, and ignore further signals while it unwinds the stack."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(number, note)


@contextmanager
def _handled_by(handler: Any) -> Iterator[None]:
    """Handle the signals, except ignored ones: under nohup, in background jobs (Ctrl-C), or after `stop`."""
    ours = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in ours}
    try:
        yield
    finally:
        for number in ours:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, before[number])
