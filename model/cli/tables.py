"""Tables on the terminal."""

import numpy as np
from numpy.typing import NDArray
from rich.bar import Bar
from rich.box import SIMPLE
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from model.training import History

BAR_WIDTH = 40


def history_table(history: History, title: str) -> Table:
    """About ten rows of the history: the first epoch, evenly spaced ones, and the last."""
    headers = ("\nepoch", "\nloss", "train\naccuracy", "test\naccuracy", "\nseconds")
    table = Table(*headers, title=title, box=SIMPLE, padding=0, show_edge=False)  # 38 columns
    for column in table.columns:
        column.justify = "right"
    for epoch in history.selected():
        table.add_row(
            f"{epoch.epoch}",
            f"{epoch.loss:.4f}",
            f"{epoch.train_accuracy:.2%}",
            f"{epoch.test_accuracy:.2%}",
            f"{epoch.seconds:.3f}",
        )
    return table


def probability_bars(probabilities: NDArray[np.floating]) -> Table:
    """A bar for the probability of each class, (classes,), from 0 to 1."""
    table = Table.grid(padding=(0, 2))
    for label, probability in enumerate(probabilities):
        table.add_row(f"{label}", f"{probability:6.1%}", ProbabilityBar(1, 0, probability, width=BAR_WIDTH))
    return table


class ProbabilityBar(Bar):
    """A bar that falls back to ASCII where the terminal's encoding may lack block characters."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.ascii_only:
            return iter([Text("#" * round(BAR_WIDTH * self.end / self.size))])
        return super().__rich_console__(console, options)
