"""Tables and numbers of the READMEs, from the published results: ``python -m bench.publish.tables`` renews them."""

import functools
import io
import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from bench import REPEATS, RESULTS
from bench.measure.interleave import Ratio, verdict
from bench.publish.figures import Results, load
from bench.publish.style import ordered, short
from bench.studies.break_even import break_even
from bench.studies.head_to_head import BIG_PRODUCTS, against_fastest_framework
from bench.studies.workers import FEW, MEMORY_LIMIT, PROCESS
from model.published import comparison_table, full_batch_histories, history

ROOT = Path(__file__).parents[2]
PUBLISHED_RESULTS = ROOT / "bench" / "results"
DOCUMENTS = ("README.md", "kernels/README.md", "kernels/ladder/README.md", "bench/README.md")


def refresh(text: str, results: Path) -> str:
    """`text` with all between ``<!-- name -->`` and ``<!-- /name -->`` made anew from the folder `results`.

    Tables have lines of their own; numbers stand within a sentence.

    Raises
    ------
    KeyError
        If a marker names no table or number.
    """

    def fill(match: re.Match) -> str:
        name, line = match["name"], match["line"]
        return f"<!-- {name} -->{line}{(TABLES if line else NUMBERS)[name](results)}{line}<!-- /{name} -->"

    return re.sub(r"<!-- (?P<name>[\w-]+) -->(?P<line>\n?).*?<!-- /(?P=name) -->", fill, text, flags=re.DOTALL)


@functools.cache
def read(results: Path) -> Results:
    """What was measured, from the folder `results`."""
    return load(results / RESULTS)


def speed_table(results: Path) -> str:
    """Seconds per epoch of each backend, relative to NumPy and to the dense floor."""
    measured = read(results)
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
    found = read(results).found["reproduction"]
    (naive,) = history(found["runs"]["naive"]).epochs
    return (
        f"{_markdown(comparison_table(full_batch_histories(found), found['dataset'], MARKDOWN))}\n\n"
        f"`naive`, in mini-batches: {naive.test_accuracy:.2%} test accuracy after {naive.seconds:.0f} s of pure Python."
    )


def ladder_table(results: Path) -> str:
    """GFLOP/s of each step of the ladder and percent of BLAS's, on one and on all threads, and lines of code."""
    measured = read(results)
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


def competitor_table(results: Path) -> str:
    """Seconds of a step, memory and compilation of every backend and peer, dense ones first, and who is missing."""
    studies = read(results).found
    found, memory = studies["head_to_head"], studies["memory"]
    table = Table("", "form", "seconds per step", "95 % interval", "peak memory (MB)", "compilation (s)", box=MARKDOWN)
    for form, competitors in found["seconds"].items():
        for name, (median, low, high) in competitors.items():
            peak = f"{memory['peak_bytes'][name] / 1e6:.0f}" if name in memory["peak_bytes"] else ""
            seconds = found["compile_seconds"].get(name)
            table.add_row(
                name,
                form,
                f"{median:.3f}",
                f"{low:.3f} to {high:.3f}",
                peak or memory["skipped"].get(name, ""),
                short(seconds) if seconds else "",
            )
    for name, reason in found["skipped"].items():
        table.add_row(name, f"skipped: {reason}")
    return _markdown(table)


def published_ratios(found: dict[str, Any]) -> list[Ratio]:
    """Ratios of steps, of times to an accuracy, and of products, from what the studies found."""
    return [*found["head_to_head"]["ratios"], *found["time_to_accuracy"]["ratios"], *found["products"]]


def ratio_table(results: Path) -> str:
    """Ratios of times, competitors interleaved, and how they repeat."""
    table = Table("what", "time of", "relative to", "ratio", "95 % interval", "", "all runs", box=MARKDOWN)
    for row, repeated in zip(published_ratios(read(results).found), _repeated(results)):
        interval = f"{row['low']:.2f} to {row['high']:.2f}"
        runs = ", ".join(f"{ratio:.2f}" for ratio in repeated)
        table.add_row(row["what"], row["competitor"], row["base"], f"{row['ratio']:.2f}", interval, verdict(row), runs)
    return _markdown(table)


def _repeated(results: Path) -> list[list[float]]:
    """Each published ratio in every run of the studies."""

    def key(row: Ratio) -> tuple[str, str, str]:
        return row["what"], row["competitor"], row["base"]

    runs = [{key(row): row["ratio"] for row in run} for run in json.loads((results / REPEATS).read_text())]
    return [[row["ratio"], *(run[key(row)] for run in runs)] for row in published_ratios(read(results).found)]


def _spreads(results: Path) -> list[float]:
    """By how many percent the largest of a ratio's values is above the smallest, for each ratio, in order of size."""
    return sorted(100 * (max(values) / min(values) - 1) for values in _repeated(results))


def ablation_table(results: Path) -> str:
    """Milliseconds of both products without each idea of the sparse backend."""
    rows = read(results).found["ablation"]
    table = Table("variant", box=MARKDOWN)
    for column in ("forward", "backward", "both, relative to BLAS", "MB, both forms"):
        table.add_column(column, justify="right")
    blas = rows[0]["forward"] + rows[0]["backward"]
    for row in rows:
        forward, backward = row["forward"], row["backward"]
        times = short(1e3 * forward), short(1e3 * backward), f"{(forward + backward) / blas:.2f}"
        table.add_row(row["variant"], *times, f"{row['megabytes']:.0f}")
    return _markdown(table)


def distributed_table(results: Path) -> str:
    """Seconds per epoch in one process and on Dask workers, on the same cores."""
    rows = read(results).found["workers"]["seconds"]
    places = list(rows[0]["places"])
    table = Table("backend", "images", *places, "2 workers relative to one process", box=MARKDOWN)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        medians = [row["places"][place]["median"] for place in places]
        cells = (f"{row['places'][p]['low']:.3f} to {row['places'][p]['high']:.3f}" for p in places)
        ratio = f"{medians[-1] / medians[0]:.2f}"
        table.add_row(f"`{row['backend']}`", f"{row['images']:,}", *cells, ratio)
    return _markdown(table)


TABLES = {
    "distributed": distributed_table,
    "speed": speed_table,
    "competitors": competitor_table,
    "ratios": ratio_table,
    "accuracy": accuracy_table,
    "ladder": ladder_table,
    "ablation": ablation_table,
}


def _step_gain(product: str, step: str, base: str, base_product: str = "") -> Callable[[Path], str]:
    """How many times as fast as another a step of the ladder is, on one thread."""

    def number(results: Path) -> str:
        ladders = read(results).ladders
        ours, theirs = ladders[product].rungs[step, 1], ladders[base_product or product].rungs[base, 1]
        return short(ours.timing.gflop_per_second / theirs.timing.gflop_per_second)

    return number


def _nanoseconds(results: Path) -> str:
    return short(2 / read(results).ladders["MLP"].rungs["loops", 1].timing.gflop_per_second)


def _lines(results: Path, step: str) -> int:
    return read(results).ladders["MLP"].rungs[step, 1].timing.info["lines"]


def _compiled_naive_accuracy(results: Path) -> str:
    run = json.loads((results / "compiled_naive.json").read_text())
    return f"{100 * run['history'][-1]['test_accuracy']:.2f}"


def _break_even(results: Path, start: str) -> str:
    starts = read(results).found["break_even"]["starts"]
    return f"{math.ceil(break_even(starts[start], starts['numpy']))}"


def _command(results: Path, key: str) -> str:
    return short(read(results).found["break_even"]["command"][key])


def _against_bound(results: Path) -> str:
    rows = read(results).found["head_to_head"]["ratios"]
    (ratio,) = (row["ratio"] for row in rows if (row["competitor"], row["base"]) == ("sparse", BIG_PRODUCTS))
    return short(ratio)


def _against_framework(results: Path, key: str) -> str:
    found = against_fastest_framework(read(results).found["head_to_head"])
    assert found, "the published results have frameworks in them"
    return found["base"] if key == "base" else short(found["ratio"])


def _delay(results: Path) -> str:
    few = next(row for row in read(results).found["workers"]["seconds"] if row["images"] == FEW)["places"]
    return short(1e3 * (few["2 workers"]["median"] - few[PROCESS]["median"]))


def _megabytes_sent(results: Path) -> str:
    return short(read(results).found["workers"]["bytes"]["2 workers"] / 2e6)


def _peak_megabytes(results: Path, limit: int | None) -> str:
    (peak,) = (row["peak_bytes"] for row in read(results).found["workers"]["memory"] if row["limit"] == limit)
    return f"{peak / 1e6:,.0f}"


# Numbers within sentences.
NUMBERS: dict[str, Callable[[Path], str]] = {
    "nanoseconds": _nanoseconds,
    "compiled-gain": _step_gain("MLP", "compiled", "loops"),
    "compiled-near-far": _step_gain("MLP", "compiled", "compiled", "1024³"),
    "reordered-gain": _step_gain("MLP", "reordered", "compiled"),
    "reordered-gain-1024": _step_gain("1024³", "reordered", "compiled"),
    "packed-gain": _step_gain("MLP", "packed", "tiled"),
    "packed-gain-1024": _step_gain("1024³", "packed", "tiled"),
    "vectors-lines": lambda results: f"{_lines(results, 'vectors')}",
    "vectors-lines-times": lambda results: short(_lines(results, "vectors") / _lines(results, "shared")),
    "compiled-naive-accuracy": _compiled_naive_accuracy,
    "break-even": lambda results: _break_even(results, "sparse"),
    "break-even-first-run": lambda results: _break_even(results, "sparse, first run"),
    "distributed-delay": _delay,
    "distributed-megabytes": _megabytes_sent,
    "distributed-peak": lambda results: _peak_megabytes(results, None),
    "distributed-peak-limited": lambda results: _peak_megabytes(results, MEMORY_LIMIT),
    "runs": lambda results: f"{len(_repeated(results)[0])}",
    "spread-median": lambda results: f"{statistics.median(_spreads(results)):.0f}",
    "spread-largest": lambda results: f"{max(_spreads(results)):.0f}",
    "sparse-bound": _against_bound,
    "sparse-framework": lambda results: _against_framework(results, "ratio"),
    "fastest-framework": lambda results: _against_framework(results, "base"),
    "command-ratio": lambda results: _command(results, "ratio"),
    "command-seconds": lambda results: _command(results, "seconds"),
}


def _markdown(table: Table) -> str:
    table.title = None
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().strip().splitlines())  # type: ignore[attr-defined]


if __name__ == "__main__":
    for document in DOCUMENTS:
        (ROOT / document).write_text(refresh((ROOT / document).read_text(), PUBLISHED_RESULTS))
