"""Tables on the terminal."""

import numpy as np
from numpy.typing import NDArray
from rich.bar import Bar
from rich.box import SIMPLE
from rich.table import Table

from model.training import History

TABLE_ROWS = 10


def history_table(history: History, title: str) -> Table:
    """The history in about ten rows: the first epoch, evenly spaced ones, the last."""
    headers = ("\nepoch", "\nloss", "train\naccuracy", "test\naccuracy", "\nseconds")
    table = Table(*headers, title=title, box=SIMPLE, padding=0, show_edge=False)  # 38 columns
    for column in table.columns:
        column.justify = "right"
    for epoch in history.selected(TABLE_ROWS):
        table.add_row(
            f"{epoch.epoch}",
            f"{epoch.loss:.4f}",
            f"{epoch.train_accuracy:.2%}",
            f"{epoch.test_accuracy:.2%}",
            f"{epoch.seconds:.3f}",
        )
    return table


def probability_bars(probabilities: NDArray[np.floating]) -> Table:
    """A bar for the probability of each digit, (10,), from nothing to certainty."""
    table = Table.grid(padding=(0, 2))
    for digit, probability in enumerate(probabilities):
        table.add_row(f"{digit}", f"{probability:6.1%}", Bar(1, 0, probability, width=40))
    return table
