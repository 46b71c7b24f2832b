"""The live bar of a training run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from model.cli.console import err
from model.cli.signals import stoppable_between_steps


@contextmanager
def training(title: str, images: int, passed: int = 0) -> Iterator[tuple[list[int], Callable[[int], None]]]:
    """Signals wait for the running step, and a live bar over so many images is on stderr, where that is a terminal.

    Yields the list of the signals that wait, and how to advance the bar.
    """
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    bar = Progress(*columns, *times, console=err, transient=True, disable=not err.is_terminal)
    with stoppable_between_steps() as received:
        bar.start()
        try:
            task = bar.add_task(title, total=images, completed=passed)
            yield received, lambda passed: bar.advance(task, passed)
        finally:
            with suppress(OSError):  # the terminal has been closed
                bar.stop()
