"""The tables of the README, made from the published results: ``python -m bench.tables`` puts them between markers."""

import io
import json
import re
from pathlib import Path

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from bench.plots import load, ordered
from model.report import comparison_table
from model.trainer import Epoch, History

ROOT = Path(__file__).parent.parent
PUBLISHED_RESULTS = ROOT / "bench" / "results"


def refresh(text: str, results: Path) -> str:
    """`text` with each block between ``<!-- name -->`` and ``<!-- /name -->`` made anew from the folder `results`.

    Raises
    ------
    KeyError
        If a marker names no table.
    """

    def block(match: re.Match) -> str:
        name = match["name"]
        return f"<!-- {name} -->\n{TABLES[name](results)}\n<!-- /{name} -->"

    return re.sub(r"<!-- (?P<name>[\w-]+) -->\n.*?<!-- /(?P=name) -->", block, text, flags=re.DOTALL)


def speed_table(results: Path) -> str:
    """Seconds per epoch of each backend, relative to NumPy and to the dense floor."""
    measured = load(results / "results.json")
    floor, numpy = measured.dense_floor, measured.epochs["numpy"].seconds
    table = Table("backend", "seconds per epoch", "95 % interval", "× numpy's speed", "× dense floor", box=MARKDOWN)
    for name in ordered(measured.epochs):
        epoch = measured.epochs[name]
        interval = "extrapolated" if epoch.info["extrapolated_to"] else f"{epoch.low:.3f} to {epoch.high:.3f}"
        table.add_row(
            f"`{name}`",
            f"{epoch.seconds:,.3f}" if epoch.seconds < 1 else f"{epoch.seconds:,.0f}",
            interval,
            f"{numpy / epoch.seconds:.2g}",
            f"{epoch.seconds / floor:,.2f}",
        )
    return f"{_markdown(table)}\n\n{measured.small_print}"


def accuracy_table(results: Path) -> str:
    """The published accuracies beside ours, and pure Python's after its mini-batches."""
    content = json.loads((results / "reproduction.json").read_text())
    histories = {
        name: History(run["prepare_seconds"], [Epoch(**epoch) for epoch in run["history"]])
        for name, run in content["runs"].items()
    }
    naive = histories.pop("naive")
    return (
        f"{_markdown(comparison_table(histories, content['dataset'], MARKDOWN))}\n\n"
        f"`naive`, in mini-batches: {naive.epochs[-1].test_accuracy:.2%} test accuracy after "
        f"{naive.epochs[-1].seconds:.0f} s of pure Python."
    )


TABLES = {"speed": speed_table, "accuracy": accuracy_table}


def _markdown(table: Table) -> str:
    table.title = None
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().strip().splitlines())  # type: ignore[attr-defined]


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(refresh(readme.read_text(), PUBLISHED_RESULTS))
