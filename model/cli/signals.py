"""Ctrl-C, SIGTERM and SIGHUP (a closed terminal): they end a training run after its running step, all else at once."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

NOTICE = b"stopping after the running step; once more stops at once\n"
SAME_SECONDS = 0.5
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(BaseException):
    """A signal asks the program to end. Not an Exception, so that no library takes it for an error of its own.

    Attributes
    ----------
    signal : int
        SIGINT, SIGTERM or SIGHUP.
    note : str
        What to tell the user about it.
    """

    def __init__(self, signal: int, note: str = "") -> None:
        super().__init__(signal, note)
        self.signal = signal
        self.note = note


@contextmanager
def stoppable() -> Iterator[None]:
    """Within, a signal raises `Stopped`."""
    with _handled_by(lambda number, frame: stop(number)):
        yield


@contextmanager
def stoppable_between_steps() -> Iterator[list[int]]:
    """Within, the first signal is put into the list that this yields; the second raises `Stopped`.

    One that follows within half a second counts as the same: ``timeout`` and some process managers send theirs twice,
    to the process and to its group.
    """
    received: list[int] = []
    first = 0.0

    def handle(number: int, frame: Any) -> None:
        nonlocal first
        if not received:
            received.append(number)
            first = time.monotonic()
            with contextlib.suppress(OSError):  # past the console, whose lock this thread may be holding right now
                os.write(2, b"\n" * os.isatty(2) + NOTICE)
        elif time.monotonic() - first > SAME_SECONDS:
            stop(number)

    with _handled_by(handle):
        yield received


def stop(number: int, note: str = "") -> NoReturn:
    """Raise `Stopped`; no further signal disturbs what it unwinds."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(number, note)


@contextmanager
def _handled_by(handler: Any) -> Iterator[None]:
    """Handles the signals within, but none that is ignored: after nohup, a background job's Ctrl-C, or after `stop`."""
    ours = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in ours}
    try:
        yield
    finally:
        for number in ours:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, before[number])
