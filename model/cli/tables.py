"""What the commands print of their results: tables and lines."""

import numpy as np
from numpy.typing import NDArray
from rich.bar import Bar
from rich.box import SIMPLE, Box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from model.published import PUBLISHED, ReproducedRun
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


def comparison_table(histories: dict[str, History], dataset_name: str, box: Box = SIMPLE) -> Table:
    """The published accuracies beside those of each backend, in percent, with differences in percentage points."""
    table = Table("epoch", *map(str, PUBLISHED), title=f"Accuracy on {dataset_name} (%)", box=box)
    for column in table.columns[1:]:
        column.justify = "right"
    for index, kind in enumerate(("train", "test")):
        published = [accuracies[index] for accuracies in PUBLISHED.values()]
        table.add_row(f"{kind}, published", *(f"{accuracy:.2f}" for accuracy in published))
        for name, history in histories.items():
            ours = 100 * history.accuracies(kind)[[epoch - 1 for epoch in PUBLISHED]]
            last = box is SIMPLE and name == list(histories)[-1]  # Markdown knows no sections
            table.add_row(f"  {name}", *(f"{accuracy:.2f}" for accuracy in ours))
            table.add_row("    difference", *(f"{x - y:+.2f}" for x, y in zip(ours, published)), end_section=last)
    return table


def mini_batch_line(name: str, run: ReproducedRun) -> str:
    """One line on a backend that is too slow for full batches."""
    schedule, last = run.protocol, run.result().epochs[-1]
    return (
        f"{name}, one epoch over {schedule.images:,} images, batch size {schedule.batch_size}, learning "
        f"rate {schedule.learning_rate}: {last.test_accuracy:.2%} test accuracy in {last.seconds:.0f} s"
    )


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
