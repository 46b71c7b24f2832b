"""The progress bar of a training run."""

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
from model.signals import stoppable_between_steps


@contextmanager
def training(title: str, images: int, passed: int = 0) -> Iterator[tuple[list[int], Callable[[int], None]]]:
    """Defer signals to the end of the step, and show a progress bar over `images` on stderr, if that is a terminal.

    Yields the list of deferred signals, and a function that advances the bar by a number of images.
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
