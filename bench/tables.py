"""The tables of the READMEs, made from the published results: ``python -m bench.tables`` puts them between markers."""

import io
import itertools
import json
import re
from pathlib import Path

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from bench import RESULTS
from bench.plots import load
from model.figures import ordered, short
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
    measured = load(results / RESULTS)
    floor, numpy = measured.dense_floor, measured.epochs["numpy"].seconds
    table = Table("backend", "seconds per epoch", "95 % interval", "× numpy's speed", "× dense floor", box=MARKDOWN)
    for name in ordered(measured.epochs):
        epoch = measured.epochs[name]
        interval = "extrapolated" if epoch.info["extrapolated_to"] else f"{epoch.low:.3f} to {epoch.high:.3f}"
        table.add_row(
            f"`{name}`",
            f"{epoch.seconds:,.3f}" if epoch.seconds < 1 else f"{epoch.seconds:,.0f}",
            interval,
            short(numpy / epoch.seconds),
            f"{epoch.seconds / floor:,.2f}" if epoch.seconds < 10 * floor else short(epoch.seconds / floor),
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


def ladder_table(results: Path) -> str:
    """GFLOP/s of each step of the ladder and percent of BLAS's, on one and on all threads, and lines of code."""
    measured = load(results / RESULTS)
    runs = [(product, threads) for product in measured.ladders for threads in sorted(measured.multiply_adds)]
    table = Table("step", "lines", box=MARKDOWN)
    for product, threads in runs:
        table.add_column(f"{product}, {'1 thread' if threads == 1 else f'{threads} threads'}", justify="right")
    for step in next(iter(measured.ladders.values())).steps:
        rungs = [measured.ladders[product].rungs.get((step, threads)) for product, threads in runs]
        lines = next(rung.timing.info["lines"] for rung in rungs if rung)
        cells = [f"{short(r.timing.gflop_per_second)} ({short(100 * r.of_blas)} %)" if r else "" for r in rungs]
        table.add_row(f"`{step}`", str(lines), *cells)
    table.add_row("OpenBLAS", "", *(short(measured.ladders[product].blas(threads)) for product, threads in runs))
    table.add_row("peak", "", *(short(measured.multiply_adds[threads]) for _, threads in runs))
    return f"{_markdown(table)}\n\n{measured.small_print}"


def ratio_table(results: Path) -> str:
    """Ratios of times, competitors interleaved."""
    studies = json.loads((results / RESULTS).read_text())["studies"]
    table = Table("what", "time of", "relative to", "ratio", "95 % interval", box=MARKDOWN)
    for row in itertools.chain(studies["head_to_head"]["found"], studies["products"]["found"]):
        interval = f"{row['low']:.2f} to {row['high']:.2f}"
        table.add_row(row["what"], row["competitor"], row["base"], f"{row['ratio']:.2f}", interval)
    return _markdown(table)


def ablation_table(results: Path) -> str:
    """Milliseconds of both products without each idea of the sparse backend."""
    rows = json.loads((results / RESULTS).read_text())["studies"]["ablation"]["found"]
    table = Table("variant", box=MARKDOWN)
    for column in ("forward", "backward", "both, relative to BLAS", "MB, both forms"):
        table.add_column(column, justify="right")
    blas = rows[0]["forward"] + rows[0]["backward"]
    for row in rows:
        forward, backward = row["forward"], row["backward"]
        times = short(1e3 * forward), short(1e3 * backward), f"{(forward + backward) / blas:.2f}"
        table.add_row(row["variant"], *times, f"{row['megabytes']:.0f}")
    return _markdown(table)


TABLES = {
    "speed": speed_table,
    "ratios": ratio_table,
    "accuracy": accuracy_table,
    "ladder": ladder_table,
    "ablation": ablation_table,
}


def _markdown(table: Table) -> str:
    table.title = None
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().strip().splitlines())  # type: ignore[attr-defined]


if __name__ == "__main__":
    for readme in (ROOT / "README.md", ROOT / "kernels" / "README.md"):
        readme.write_text(refresh(readme.read_text(), PUBLISHED_RESULTS))
