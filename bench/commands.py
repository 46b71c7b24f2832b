"""``python -m bench run`` makes studies, ``results`` a whole folder for a machine, ``draw`` figures and a report."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench.measure.machine import busy_now, machine, slug, under_conditions
from bench.measure.records import Machine, RecordError, Section, read, write
from bench.publish.folder import MACHINE, RUN, existing_run, read_folder, save
from bench.publish.report import write_report
from bench.studies import STUDIES, study
from model.cli.options import parse_path
from model.cli.signals import Stopped
from model.data import DataError, limited, load_dataset
from model.extras.environment import environment
from model.extras.files import make_folder

app = typer.Typer(help="Studies that take more than a benchmark.", add_completion=False, pretty_exceptions_enable=False)
out = Console(markup=False, highlight=False, soft_wrap=True)
Output = Annotated[Path, typer.Option(parser=parse_path, metavar="FOLDER", help="Folder for the results and plots.")]
DEFAULT = Path("bench/output")

EVERY_RUN = ("epochs", "ladder", "head_to_head", "mini_batches", "products")
"""Studies that `results` makes in every run. The others, deterministic or minutes each, come in the last run only."""


def chosen(names: list[str] | None) -> list[str]:
    """The studies to make."""
    if unknown := set(names or ()).difference(STUDIES):
        raise typer.BadParameter(f"no study is named {', '.join(sorted(unknown))}; there are {', '.join(STUDIES)}")
    return list(names or STUDIES)


@app.command()
def run(
    names: Annotated[list[str] | None, typer.Argument(help=f"{', '.join(STUDIES)} [default: all]")] = None,
    quick: Annotated[bool, typer.Option(help="Only to try it: little work, into the folder quick.")] = False,
    dataset: Annotated[str, typer.Option(help="mnist, digits28 or auto.")] = "auto",
    output: Output = DEFAULT,
    report: Annotated[bool, typer.Option(help="Draw the figures and write the report.")] = True,
) -> None:
    """Make studies and add what they found to the run in the folder, each with the conditions it met."""
    wanted = chosen(names)
    folder = output / "quick" if quick else output
    existing_run(folder)
    if len(wanted) > 1:  # each in a fresh process, without threads of another's packages
        options = ["--dataset", dataset, "--output", str(output), "--no-report", *["--quick"] * quick]
        failed = [name for name in wanted if subprocess.run(_bench("run", name, *options)).returncode]
    else:
        failed = []
        measure_into(folder, wanted[0], dataset, quick)
    if report and (folder / RUN).exists():
        show(folder, folder, dict.fromkeys(failed, "it failed; see above"))
    if failed:
        out.print(f"failed: {', '.join(failed)}")
        raise typer.Exit(1)


def measure_into(folder: Path, name: str, dataset: str, quick: bool) -> None:
    """Make one study and write the run again with it."""
    images = load_dataset(dataset)
    images = limited(images, 6_000) if quick else images
    if busy := busy_now():
        out.print(f"warning: {busy}; the timings will be marked")
    out.print(f"{name} ...")
    result, conditions = under_conditions(lambda: study(name).measure(images, quick), images.name, quick)
    before = existing_run(folder)
    sections = {**before.sections, name: Section(conditions, result)}
    save(folder, with_rates(machine(), sections), dataclasses.replace(before, sections=sections))


def with_rates(here: Machine, sections: dict[str, Section]) -> Machine:
    """The machine with its peak and bandwidths, where they have been measured."""
    if "roofline" not in sections:
        return here
    roofline = sections["roofline"].found
    return dataclasses.replace(
        here,
        peak_gflop_per_second=roofline.peak_gflop_per_second,
        bandwidth_gb_per_second=roofline.bandwidth_gb_per_second,
    )


@app.command()
def results(
    runs: Annotated[int, typer.Option(min=1, help="How many runs; claims need all to agree.")] = 3,
    dataset: Annotated[str, typer.Option(help="mnist, digits28 or auto.")] = "mnist",
    output: Annotated[
        Path | None,
        typer.Option(parser=parse_path, metavar="FOLDER", help="Folder [default: bench/results/MACHINE]."),
    ] = None,
    quick: Annotated[bool, typer.Option(help="Only to try it.")] = False,
) -> None:
    """Measure everything on this machine and write a folder of results that can be published."""
    commit = environment()["commit"]
    if not quick and (not commit or commit.endswith("-dirty")):
        raise RecordError(f"published runs need a clean commit, and this is {commit or 'none'}: commit first")
    here = machine()
    folder = output or Path(__file__).parent / "results" / slug(here)
    existing_run(folder)
    load_dataset(dataset)
    failures: dict[str, str] = {}
    for number in range(runs):
        scratch = Path("bench/output/measuring") / f"{number + 1}"
        for file in (scratch / RUN, scratch / "quick" / RUN):
            file.unlink(missing_ok=True)
        names = [name for name in STUDIES if number == runs - 1 or name in EVERY_RUN]
        out.print(f"run {number + 1} of {runs}: {', '.join(names)}")
        options = ["--dataset", dataset, "--output", str(scratch), "--no-report", *["--quick"] * quick]
        subprocess.run(_bench("run", *names, *options))
        measured = scratch / "quick" if quick else scratch
        measured_run = existing_run(measured)
        skipped = {name: "the study failed" for name in names if name not in measured_run.sections}
        failures |= skipped
        if not measured_run.sections:
            continue
        date = min(section.conditions.date for section in measured_run.sections.values())[:10]
        same_day = len(list(folder.glob(f"run-{date}-*.json")))
        write(folder / f"run-{date}-{same_day + 1}.json", dataclasses.replace(measured_run, skipped=skipped))
        write(folder / MACHINE, read(Machine, measured / MACHINE))
    DEFAULT.mkdir(parents=True, exist_ok=True)
    out.print(f"to publish: python -m bench.publish.tables, and commit {folder}")
    show(folder, DEFAULT, failures)
    if failures:
        raise typer.Exit(1)


@app.command()
def draw(
    folder: Annotated[
        Path,
        typer.Argument(parser=parse_path, metavar="FOLDER", help="A folder of results, from this machine or another."),
    ],
    output: Output = DEFAULT,
) -> None:
    """Draw every figure that the results have data for, and write the report."""
    make_folder(output)
    show(folder, output, {})


def show(folder: Path, output: Path, missing: dict[str, str]) -> None:
    """Figures and the report, which is named last."""
    file = write_report(read_folder(folder), output, out.print, missing)
    for figure in sorted(output.glob("*.png")):
        out.print(str(figure))
    out.print(f"report: {file}")


def _bench(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "bench", *arguments]


def main() -> None:
    """Run the command line; every expected error is one line on stderr and exit code 2."""
    try:
        app()
    except Stopped as stopped:
        sys.exit(128 + stopped.signal)
    except (DataError, RecordError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
