"""Tables and numbers in the READMEs, from the published results: ``python -m bench publish`` updates them.

Claims cover every machine; other tables show the machine with the most studies.
"""

import functools
import io
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from bench.measure.machine import cpu_unit, has_history, kernels_changed
from bench.peers import Form
from bench.publish.claims import (
    BATCHES,
    BY_KEY,
    CLAIMS,
    FRAMEWORKS,
    MAIN,
    PRODUCTS,
    cell_text,
    cells,
    sentence,
)
from bench.publish.folder import Folder, read_all
from bench.publish.style import low_to_high, over_runs, short, small_print
from bench.studies.epochs import FEW_IMAGES
from bench.studies.ladder import BLAS
from bench.studies.mini_batches import PARTS, WHOLE
from bench.studies.workers import MEMORY_LIMIT, calculation
from model.cli.console import counted
from model.cli.tables import comparison_table
from model.published import full_batch_histories

ROOT = Path(__file__).parents[2]
PUBLISHED_RESULTS = ROOT / "bench" / "results"
DOCUMENTS = (
    "README.md",
    "kernels/README.md",
    "kernels/ladder/README.md",
    "model/extras/README.md",
    "bench/README.md",
)

FORM_SIZE = 128
"""Batch size at which the forms of other packages are compared, next to the full batch."""

STEPS = ((32, "numpy"), (32, "numba"), (32, "sparse"), (512, "sparse"))
"""Batch size and backend of each column of the table of a step's parts."""


class MissingError(Exception):
    """No published machine has the data for a table or number."""


def refresh(text: str, results: Path) -> str:
    """Update everything in `text` between ``<!-- name -->`` and ``<!-- /name -->`` from the folders in `results`.

    Tables are on separate lines, numbers within a sentence. If no machine has the data, the old text stays.

    Raises
    ------
    KeyError
        If a marker names no table or number.
    """

    def fill(match: re.Match) -> str:
        name, line = match["name"], match["line"]
        make = (TABLES if line else NUMBERS)[name]
        try:
            return f"<!-- {name} -->{line}{make(results)}{line}<!-- /{name} -->"
        except MissingError:
            return match[0]

    return re.sub(r"<!-- (?P<name>[\w-]+) -->(?P<line>\n?).*?<!-- /(?P=name) -->", fill, text, flags=re.DOTALL)


@functools.cache
def folders(results: Path) -> list[Folder]:
    """The results of every machine, read once."""
    return read_all(results)


def main_folder(results: Path) -> Folder:
    """The machine with the most studies; of several, the one measured last."""

    def rank(folder: Folder) -> tuple[int, str]:
        dates = [section.conditions.date for run in folder.runs for section in run.sections.values()]
        return len(folder.studies), max(dates, default="")

    return max(folders(results), key=rank)


def result_of(results: Path, study: str) -> Any:
    """A study's `Result` on the main machine."""
    result = main_folder(results).result(study)
    if result is None:
        raise MissingError(study)
    return result


def origin(results: Path, study: str) -> str:
    """The small print of a study on the main machine."""
    folder = main_folder(results)
    section = folder.section(study)
    return small_print(section, folder.machine) if section else ""


def claim_table(results: Path, table_name: str = MAIN) -> str:
    """The claims of a table, by machine."""
    every = folders(results)
    columns = [f"{folder.label}, at {', '.join(folder.commits)}" for folder in every]
    table = Table("competitor / base, task", *columns, "holds on", box=MARKDOWN)
    text = ""
    for claim in CLAIMS:
        evidence = cells(claim, every) if claim.table == table_name else {}
        if evidence:
            holding = sum(each.holds for each in evidence.values())
            texts = [cell_text(evidence.get(folder.label), claim.base) for folder in every]
            text += "".join(texts)
            table.add_row(f"{claim.competitor} / {claim.base}, {claim.what}", *texts, f"{holding} of {len(evidence)}")
    notes = [
        "Each cell: time ratio (its range over all runs) × the base's seconds.",
        "✓ less time in every run, ✗ more time in every run, ≈ undecided: runs disagree, or an interval includes 1.",
        "No interval: stored without rounds, or with fewer than six; the ratio alone counts." * ("no interval" in text),
        "Busy: other processes were running, or the hypervisor ran other guests." * ("busy" in text),
    ]
    if table_name == MAIN:
        notes += [
            f"`naive`: scaled up from {FEW_IMAGES} images.",
            f"The fastest framework: of {', '.join(FRAMEWORKS[:-1])} and {FRAMEWORKS[-1]}, as far as measured.",
            "Big products, OpenBLAS: only the two products with the images.",
            "To the published accuracy: undecided where the ranges over random starts overlap.",
            "Ladder: seconds per 10⁹ operations.",
        ]
    return f"{_markdown(table)}\n\n{' '.join(filter(None, notes))}"


def accuracy_table(results: Path) -> str:
    """The published accuracies beside ours, and pure Python's after its mini-batches."""
    reproduced = result_of(results, "reproduction").reproduced
    table = _markdown(comparison_table(full_batch_histories(reproduced), reproduced.dataset, MARKDOWN))
    for name, run in reproduced.runs.items():
        if run.protocol.batch_size:
            last = run.result().epochs[-1]
            words = f"{last.test_accuracy:.2%} test accuracy after {last.seconds:.0f} s of pure Python."
            table += f"\n\n`{name}`, in mini-batches: {words}"
    return table


def ladder_table(results: Path) -> str:
    """GFLOP/s of each step of the ladder and percent of BLAS's, the range over the runs, and lines of code."""
    runs = main_folder(results).every("ladder")
    if not runs:
        raise MissingError("ladder")
    last = runs[-1]
    table = Table("step", "lines", box=MARKDOWN)
    for climb in last.climbs:
        table.add_column(f"{climb.product}, {counted(climb.threads, 'thread')}", justify="right")
    places = [[run.climb(climb.product, climb.threads) for run in runs] for climb in last.climbs]
    for step in [*last.lines, BLAS]:
        texts = []
        for climbs in places:
            rates = [climb.rate(step) for climb in climbs if step in climb.seconds_per_gflop]
            percent = [climb.percent_of_blas(step) for climb in climbs if step in climb.steps]
            texts.append(_range(rates) + (f" ({_range(percent)} %)" if percent else ""))
        table.add_row(step if step == BLAS else f"`{step}`", str(last.lines.get(step, "")), *texts)
    table.add_row("peak", "", *(_range([climb.peak_gflop_per_second for climb in climbs]) for climbs in places))
    busy = [section.conditions.busy for section in main_folder(results).sections("ladder") if section.conditions.busy]
    marked = f", {len(busy)} of them on a busy machine ({'; '.join(busy)})" if busy else ""
    return f"{_markdown(table)}\n\nRanges over {len(runs)} runs{marked}.\n{origin(results, 'ladder')}"


def _range(values: list[float]) -> str:
    return low_to_high(short(min(values)), short(max(values))) if values else ""


def competitor_table(results: Path) -> str:
    """Seconds per step, error, peak memory and compile time of every backend and peer, and which are missing."""
    result, memory = result_of(results, "head_to_head"), result_of(results, "memory")
    runs = [run.steps for run in main_folder(results).idle_results("head_to_head")]
    columns = ("form", "seconds per step", "range over the runs", "error", "peak memory (MB)", "compilation (s)")
    table = Table("", *columns, box=MARKDOWN)
    categories = {name: category for category, names in result.categories.items() for name in names}
    for name in result.steps.seconds:
        times = over_runs(runs, name)
        peak = f"{memory.peak_bytes[name] / 1e6:.0f}" if name in memory.peak_bytes else memory.skipped.get(name, "")
        seconds = result.compile_seconds.get(name)
        reach = f"{times.low:.3f} to {times.high:.3f}"
        chosen = result.chosen.get(name, "ours")
        form = categories.get(name, "reference") + (f": {chosen}" if chosen != "ours" else "")
        error = result.tried[name][result.chosen[name]].error if name in result.chosen else None
        off = f"{error:.1e}" if error is not None else ""
        table.add_row(name, form, f"{times.median:.3f}", reach, off, peak, short(seconds) if seconds else "")
    for name, reason in result.skipped.items():
        table.add_row(name, f"skipped: {reason}")
    compiled = f"C CSR is compiled with `{result.c_command}`.\n" if "C CSR" in result.steps else ""
    return f"{_markdown(table)}\n\nMedians over the runs.\n{compiled}{origin(results, 'head_to_head')}"


def form_table(results: Path) -> str:
    """Every form of the peers that have several: its time relative to the fastest, the range over the runs."""
    folder = main_folder(results)
    full_batch = [run.tried for run in folder.every("head_to_head") if run.tried]
    if not full_batch:
        raise MissingError("forms")
    small = [run.tried.get(1, {}).get(FORM_SIZE, {}) for run in folder.every("mini_batches")]
    heads = "full batch, relative to the fastest", "fastest in", f"{FORM_SIZE} images, 1 thread", "fastest in"
    table = Table("", "form", *heads, box=MARKDOWN)
    for name in dict.fromkeys(name for tried in full_batch for name, forms in tried.items() if len(forms) > 1):
        for form in dict.fromkeys(form for tried in full_batch for form in tried.get(name, {})):
            table.add_row(name, form, *_form_cells(full_batch, name, form), *_form_cells(small, name, form))
    note = "Medians of three interleaved rounds in each run, which choose the form: ranges, not intervals."
    return f"{_markdown(table)}\n\n{note}\n{origin(results, 'head_to_head')}"


def _form_cells(runs: list[dict[str, dict[str, Form]]], name: str, form: str) -> tuple[str, str]:
    """The time of a form relative to the fastest one, and in how many runs it was that."""
    measured = [tried[name] for tried in runs if form in tried.get(name, {})]
    times = [
        seconds / min(filter(None, (other.seconds for other in forms.values())))
        for forms in measured
        if (seconds := forms[form].seconds)
    ]
    if times:
        return low_to_high(f"{min(times):.2f}", f"{max(times):.2f}"), f"{times.count(1)} of {len(times)} runs"
    reasons = dict.fromkeys(filter(None, (forms[form].skipped for forms in measured)))
    return (f"skipped: {'; '.join(reasons)}" if reasons else "the only one that runs" if measured else ""), ""


def ablation_table(results: Path) -> str:
    """Milliseconds of both products without each technique of the sparse backend."""
    result = result_of(results, "ablation")
    table = Table("variant", box=MARKDOWN)
    for column in ("forward", "backward", "both, relative to BLAS", "MB, both forms"):
        table.add_column(column, justify="right")
    seconds = {name: (result.forward.median(name), result.backward.median(name)) for name in result.megabytes}
    blas = sum(next(iter(seconds.values())))
    for name, (forward, backward) in seconds.items():
        times = short(1e3 * forward), short(1e3 * backward), f"{(forward + backward) / blas:.2f}"
        table.add_row(name, *times, f"{result.megabytes[name]:.0f}")
    return f"{_markdown(table)}\n\n{origin(results, 'ablation')}"


def step_table(results: Path) -> str:
    """Microseconds of each part of a step over a mini-batch, on one thread."""
    folder = main_folder(results)
    section = folder.section("mini_batches")
    if section is None:
        raise MissingError("mini_batches")
    parts = section.result.parts
    table = Table("part", box=MARKDOWN)
    columns = []
    for size, name in STEPS:
        if size in parts:
            table.add_column(f"{name}, {size} images", justify="right")
            columns.append(parts[size][name])
    for part in (*PARTS, WHOLE):
        table.add_row(part, *(short(1e6 * column.median(part)) for column in columns))
    return f"{_markdown(table)}\n\n{small_print(section, folder.machine, 'medians')}"


def workers_table(results: Path) -> str:
    """Client traffic and overhead of an epoch, by number of Dask workers."""
    table = Table("workers", "MB through the client", "tasks", "overhead (s)", box=MARKDOWN)
    for column in table.columns:
        column.justify = "right"
    for row in result_of(results, "workers").traffic:
        megabytes, tasks = short(row.client_bytes / 1e6), f"{row.tasks:.0f}"
        table.add_row(f"{row.workers}", megabytes, tasks, short(row.overhead) if row.overhead else "0")
    return f"{_markdown(table)}\n\n{origin(results, 'workers')}"


def growth_table(results: Path) -> str:
    """Cost per image as their number grows, with memory-mapped files and a memory limit."""
    table = Table("images", "µs per image", "memory of the process (MB)", box=MARKDOWN)
    for column in table.columns:
        column.justify = "right"
    for row in result_of(results, "workers").growth:
        table.add_row(f"{row.images:,}", short(row.microseconds), f"{row.own_bytes / 1e6:.0f}")
    return f"{_markdown(table)}\n\n{origin(results, 'workers')}"


def billion_table(results: Path) -> str:
    """Seconds of an epoch over a billion images: calculated, not measured."""
    table = Table("workers", "arithmetic (s)", "tasks (s)", "network (s)", "hashing, once (s)", box=MARKDOWN)
    for column in table.columns:
        column.justify = "right"
    for workers in (16, 128, 1024):
        table.add_row(f"{workers:,}", *map(short, calculation(result_of(results, "workers"), workers, 1e9).values()))
    return _markdown(table)


def picture_table(results: Path) -> str:
    """How often each kind of picture is recognised, and its blank pages are refused."""
    result = result_of(results, "pictures")
    table = Table("kind", "right (%)", "blank pages refused (%)", box=MARKDOWN)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, right in result.right.items():
        blank = result.blank_refused.get(name)
        table.add_row(name, f"{right:.0f}", "" if blank is None else f"{blank:.0f}")
    table.add_row("two digits: refused", f"{result.pairs_refused:.0f}", "")
    return f"{_markdown(table)}\n\n{result.pictures} pictures of each kind.\n{origin(results, 'pictures')}"


def machine_table(results: Path) -> str:
    """Each machine, with the number and dates of its runs, and whether the measured kernels are today's."""
    table = Table("machine", "CPU", "runs", "days", "commit", "kernels/ since then", "NumPy's BLAS", box=MARKDOWN)
    for folder in folders(results):
        sections = [section for run in folder.runs for section in run.sections.values()]
        days = ", ".join(sorted({section.conditions.date[:10] for section in sections}))
        here = folder.machine
        cpu = f"{here.cpu}, {here.cores} {cpu_unit(here)}"
        changed = kernels_changed(*folder.commits)
        if changed is None and not has_history():
            raise MissingError("the history of kernels/")
        since = {True: "changed", False: "unchanged", None: "unknown commit"}[changed]
        commits = ", ".join(folder.commits)
        table.add_row(folder.label, cpu, str(len(folder.runs)), days, commits, since, here.blas or "")
    return _markdown(table)


TABLES: dict[str, Callable[[Path], str]] = {
    MAIN: claim_table,
    **{name: partial(claim_table, table_name=name) for name in (BATCHES, PRODUCTS)},
    "machines": machine_table,
    "workers": workers_table,
    "growth": growth_table,
    "billion": billion_table,
    "pictures": picture_table,
    "competitors": competitor_table,
    "forms": form_table,
    "accuracy": accuracy_table,
    "ladder": ladder_table,
    "ablation": ablation_table,
    "steps": step_table,
}


def _step_gain(product: str, step: str, base: str, base_product: str = "") -> Callable[[Path], str]:
    """The speed of a step of the ladder relative to another's, on one thread: its range over the runs."""

    def number(results: Path) -> str:
        runs = _ladders(results)
        theirs = [run.climb(base_product or product, 1).rate(base) for run in runs]
        return _range([run.climb(product, 1).rate(step) / rate for run, rate in zip(runs, theirs)])

    return number


def _nanoseconds(results: Path) -> str:
    return _range([2 / run.climb("MLP", 1).rate("loops") for run in _ladders(results)])


def _ladders(results: Path) -> list[Any]:
    runs = main_folder(results).every("ladder")
    if not runs:
        raise MissingError("ladder")
    return runs


def _lines(results: Path, step: str) -> int:
    return result_of(results, "ladder").lines[step]


def _compiled_naive_accuracy(results: Path) -> str:
    run = json.loads((results / "compiled_naive.json").read_text())
    return f"{100 * run['history'][-1]['test_accuracy']:.2f}"


def _peak_megabytes(results: Path, limit: int | None) -> str:
    (peak,) = (row.peak_bytes for row in result_of(results, "workers").memory if row.limit == limit)
    return f"{peak / 1e6:,.0f}"


# Numbers within sentences.
NUMBERS: dict[str, Callable[[Path], str]] = {
    "machine": lambda results: main_folder(results).label,
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
    "peak": lambda results: _peak_megabytes(results, None),
    "peak-limited": lambda results: _peak_megabytes(results, MEMORY_LIMIT),
    # For every claim: the whole sentence.
    **{f"says-{key}": lambda results, key=key: sentence(BY_KEY[key], folders(results)) for key in BY_KEY},  # type: ignore[misc]
}


def _markdown(table: Table) -> str:
    table.title = None
    console = Console(file=io.StringIO(), width=400)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().strip().splitlines())  # type: ignore[attr-defined]
