"""``report.html``: one file with the claims for a machine, every figure, the tables, and what was skipped."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from bench.measure.machine import cpu_words, kernels_changed
from bench.measure.records import Comparison
from bench.peers import Form
from bench.publish.claims import CLAIMS, cell, two_digits
from bench.publish.folder import Folder
from bench.publish.style import over_runs, short
from bench.studies import mini_batches
from model.files import write_atomically

REPORT = "report.html"

# For each figure, in one sentence each: what it shows, and its limitations.
CAPTIONS = {
    "claims": (
        "Time relative to the base: left of the line, the competitor takes less.",
        "Bars span the runs, and faint ticks mark peak FMA throughput.",
    ),
    "epochs": (
        "Seconds per full-batch epoch on each backend (log scale), and of the two big products on OpenBLAS.",
        "Hatched bars are scaled up from a few images, and the big products are a reference, not a bound.",
    ),
    "kernels": (
        "Throughput of each kernel on one thread, at the shapes of a training step.",
        "Multiplications by zero are counted, so a backend that skips them can exceed the peak.",
    ),
    "ladder": (
        "The gain of each step in optimizing matrix multiplication, from Python loops to vectors and threads.",
        "Slow steps compute only part of the rows, and gains differ between CPUs, as their caches do.",
    ),
    "roofline": (
        "How close the big products come to the bounds of arithmetic and of each memory level, on one thread.",
        "Only compulsory traffic is counted, not what a product reads again.",
    ),
    "head_to_head": (
        "The same full-batch step in other packages, each verified against float64 before it is timed.",
        "This is one small network on one machine; the packages are designed for other workloads, too.",
    ),
    "mini_batches": (
        "Microseconds per training step against batch size, each step on different images.",
        "Small batches are bound by call overhead, and ours also prepare each batch from bytes.",
    ),
    "products": (
        "Time of each product relative to OpenBLAS's, by shape (rows) and transposes (columns).",
        "One thread, with operands as they lie in memory: packing them is part of the time.",
    ),
    "time_to_accuracy": (
        "Test accuracy against seconds of mini-batch training, each competitor at its best batch size and rate.",
        "Times vary with the random start; where ranges overlap, there is no ranking.",
    ),
    "density": (
        "The share of non-zero pixels above which dense products take less time than skipping zeros.",
        "The images are random, except at the marked point.",
    ),
    "scaling": (
        "How the time of an epoch scales with images, batch size, hidden units and threads.",
        "Hollow marks were measured on part of an epoch and scaled up.",
    ),
    "break_even": (
        "Seconds since process start against epochs: where a line crosses NumPy's, its start-up cost is paid back.",
        "The slope is the median epoch, and the start depends on the disk and the interpreter.",
    ),
    "reproduction": (
        "Accuracy by epoch, with the published points and a band over random starts.",
        "Learning rate and initialisation were fitted to the published table.",
    ),
}


class TableOf(NamedTuple):
    """A table of the report."""

    title: str
    text: str
    columns: list[str]
    rows: list[list[str]]


def write_report(folder: Folder, figures: dict[str, Path], output: Path, missing: dict[str, str]) -> Path:
    """Write the report into `output`; returns its path.

    Parameters
    ----------
    folder
        The results.
    figures
        From `bench.publish.figures.draw_all`.
    output
        Folder for the report.
    missing
        Studies that were not measured, with the reason.
    """
    for run in folder.runs:
        missing = {**run.skipped, **missing}
    sections = [
        (f"Run {number}, {name}", section.conditions)
        for number, run in enumerate(folder.runs, 1)
        for name, section in run.sections.items()
    ]
    warnings = [f"{name}: {conditions.busy}." for name, conditions in sections if conditions.busy]
    if any(conditions.quick for _, conditions in sections):
        warnings.insert(0, "A quick run on few images and rounds: a smoke test, not a measurement.")
    claims = _claims(folder)
    tables = [*_timings(folder), _conditions(folder), _skipped(folder, missing)]
    environment = Environment(loader=PackageLoader("bench.publish", "."), autoescape=True, undefined=StrictUndefined)
    html = environment.get_template("report.html.jinja").render(
        machine=folder.machine,
        words=cpu_words(folder.machine),
        details=_details(folder),
        runs=len(folder.runs),
        commits=", ".join(folder.commits),
        kernels_changed=kernels_changed(*folder.commits) if folder.commits else None,
        warnings=warnings,
        claims=claims,
        tables=[table for table in tables if table.rows],
        figures=[
            {
                "name": name,
                "png": base64.b64encode(file.read_bytes()).decode(),
                "see": CAPTIONS[name][0],
                "limit": CAPTIONS[name][1],
            }
            for name, file in figures.items()
        ],
    )
    write_atomically(output / REPORT, html.encode())
    return output / REPORT


def _details(folder: Folder) -> str:
    """What else is known of the machine, in a line."""
    machine, roofline = folder.machine, folder.result("roofline")
    bandwidths = roofline.bandwidth_gb_per_second.items() if roofline else ()
    rates = ", ".join(f"{level} {short(rate)}" for level, rate in bandwidths)
    known = [
        f"instruction sets: {', '.join(machine.isa)}" if machine.isa else "",
        f"hypervisor: {machine.hypervisor}" if machine.hypervisor else "",
        f"NumPy's BLAS: {machine.blas}" if machine.blas else "",
        f"peak of a thread: {short(roofline.peak_gflop_per_second)} GFLOP/s" if roofline else "",
        f"bandwidth in GB/s: {rates}" if rates else "",
    ]
    line = "; ".join(filter(None, known))
    return f"{line[:1].upper()}{line[1:]}." if line else ""


def _claims(folder: Folder) -> TableOf:
    rows = []
    for claim in CLAIMS:
        if evidence := cell(claim, folder):
            ends = [end for row in evidence.ratios for end in row.interval or ()]
            rows.append(
                [
                    f"{claim.competitor} / {evidence.bases}: {claim.what}",
                    evidence.span,
                    evidence.verdict,
                    f"{evidence.base_seconds:.4g}",
                    f"{two_digits(min(ends))} to {two_digits(max(ends))}" if ends else "",
                ]
            )
    columns = ["competitor / base: task", "time ratio, all runs", "verdict", "base (s)", "intervals, all runs"]
    text = (
        "Ratios of median times over interleaved rounds, with 95 % intervals; for the time to the published accuracy, "
        "the ranges over random starts. A verdict requires all runs to agree. Without an interval (fewer than six "
        "rounds), the ratio alone counts."
    )
    return TableOf("Claims", text, columns, rows)


def _timings(folder: Folder) -> list[TableOf]:
    """Tables of seconds for the main comparisons, and of the kernels."""
    tables = []
    comparisons: list[tuple[str, list[Comparison]]] = []
    if results := folder.idle_results("epochs"):
        comparisons.append(("Seconds per epoch", [result.epochs for result in results]))
    if results := folder.idle_results("head_to_head"):
        comparisons.append(("Seconds per full-batch step", [result.steps for result in results]))
    if result := folder.result("time_to_accuracy"):
        comparisons.append((f"Seconds to {result.target:.2%} test accuracy", [result.times]))
    for title, runs in comparisons:
        spans = {name: over_runs(runs, name) for name in runs[0].seconds}
        rows = [[name, f"{s.median:.4g}", f"{s.low:.4g} to {s.high:.4g}"] for name, s in spans.items()]
        note = (
            f"Medians of {len(runs)} runs." if len(runs) > 1 else "Medians of one run, with 95 % intervals if possible."
        )
        tables.append(TableOf(title, note, ["", "seconds", "range"], rows))
    if result := folder.result("kernels"):
        rows = [
            [kernel, name, short(1e6 * times.median), short(result.flop[kernel] / times.median / 1e9)]
            for kernel, comparison in result.per_image.items()
            for name, times in comparison.rounds.items()
        ]
        columns = ["kernel", "backend", "µs per image", "GFLOP/s, zeros counted"]
        tables.append(TableOf("Kernels", "On one thread.", columns, rows))
    return tables


def _conditions(folder: Folder) -> TableOf:
    rows = []
    for number, run in enumerate(folder.runs, 1):
        for name, section in run.sections.items():
            conditions = section.conditions
            environment = conditions.environment
            versions = ", ".join(f"{key} {value}" for key, value in environment.packages.items())
            variables = " ".join(f"{key}={value}" for key, value in environment.variables.items())
            rows.append(
                [
                    str(number),
                    name,
                    conditions.date,
                    conditions.dataset,
                    conditions.commit or "unknown",
                    f"{conditions.seconds:.0f}" if conditions.seconds is not None else "",
                    f"{conditions.load:.2f}" if conditions.load is not None else "",
                    f"{conditions.steal:.1%}" if conditions.steal is not None else "",
                    f"Python {environment.python}, {versions}; {variables}",
                ]
            )
    columns = ["run", "study", "start", "data set", "commit", "duration (s)", "load", "steal time", "environment"]
    return TableOf("Measuring conditions", "One row for each study of each run.", columns, rows)


def _skipped(folder: Folder, missing: dict[str, str]) -> TableOf:
    rows = [[name, reason] for name, reason in missing.items()]
    for study in sorted(folder.studies):
        result = folder.result(study)
        rows += [[f"{study}: {name}", reason] for name, reason in getattr(result, "skipped", {}).items()]
        for name, forms in forms_tried(result):
            rows += [[f"{study}: {name}, {form}", each.skipped] for form, each in forms.items() if each.skipped]
    unique = [list(row) for row in dict.fromkeys(map(tuple, rows))]
    return TableOf("Skipped", "What was not measured, and why.", ["what", "why"], unique)


def forms_tried(result: Any) -> Iterator[tuple[str, dict[str, Form]]]:
    """Names of competitors, each with its forms, from a study's result; a name comes once for each batch size."""
    if isinstance(result, mini_batches.Result):
        for sizes in result.tried.values():
            for names in sizes.values():
                yield from names.items()
    else:
        yield from getattr(result, "tried", {}).items()
