"""``python -m bench run`` runs studies, ``results`` measures a machine, ``publish`` and ``draw`` show the results."""

import contextlib
import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.measure.machine import busy_now, machine, slug, under_conditions
from bench.measure.records import Machine, RecordError, Section, read, write
from bench.publish.figures import draw_all
from bench.publish.folder import MACHINE, RUN, existing_run, numbered, read_folder, save
from bench.publish.report import write_report
from bench.studies import DATASETS, EVERY_RUN, STUDIES, study
from model.cli.console import fail, print_any_name, print_result
from model.data import DataError, limited, load_dataset
from model.environment import environment
from model.files import make_folder, parse_path, write_atomically

app = typer.Typer(
    help="Run studies, and draw their results.",
    rich_markup_mode=None,  # markup would swallow [default: ...]
    add_completion=False,
    pretty_exceptions_enable=False,
)


def parse_dataset(text: str) -> str:
    """One of `DATASETS`."""
    if text not in DATASETS:
        raise typer.BadParameter(f"the studies do not run on {text!r}: choose one of {', '.join(DATASETS)}")
    return text


DatasetName = Annotated[str, typer.Option(parser=parse_dataset, metavar="NAME", help="mnist, digits28 or auto.")]
Output = Annotated[Path, typer.Option(parser=parse_path, metavar="FOLDER", help="Folder for the results and plots.")]
DEFAULT = Path("bench/output")
STOPPED = "stopped by Ctrl-C"


def chosen(names: list[str] | None) -> list[str]:
    """The studies to run."""
    if unknown := set(names or ()).difference(STUDIES):
        raise typer.BadParameter(f"no such study: {', '.join(sorted(unknown))}; choose from {', '.join(STUDIES)}")
    return list(dict.fromkeys(names or STUDIES))


@app.command()
def run(
    names: Annotated[list[str] | None, typer.Argument(help=f"{', '.join(STUDIES)} [default: all]")] = None,
    quick: Annotated[bool, typer.Option(help="Smoke test: little work, results in the subfolder quick.")] = False,
    dataset: DatasetName = "auto",
    output: Output = DEFAULT,
    report: Annotated[bool, typer.Option(help="Draw the figures and write the report.")] = True,
) -> None:
    """Run studies and add their results to the run in the folder, with the conditions of each measurement."""
    wanted = chosen(names)
    folder = output / "quick" if quick else output
    existing_run(folder)
    missing: dict[str, str] = {}
    if len(wanted) > 1:
        missing = measure_each(wanted, ["--dataset", dataset, "--output", str(output), *["--quick"] * quick])
    else:
        measure_into(folder, wanted[0], dataset, quick)
    for name, reason in missing.items():
        print_result(f"{name}: {reason}")
    drawn = show(folder, folder, missing) if report and (folder / RUN).exists() else True
    if missing or not drawn:
        raise typer.Exit(128 + signal.SIGINT if STOPPED in missing.values() else 1)


def measure_each(names: list[str], options: list[str]) -> dict[str, str]:
    """Run each study in a fresh process, free of threads that other studies' packages started.

    Returns
    -------
    dict[str, str]
        Why a study has no result: it failed, or Ctrl-C ended the run before it was complete.
    """
    missing = dict.fromkeys(names, STOPPED)
    with contextlib.suppress(KeyboardInterrupt):
        for name in names:
            failed = subprocess.run(_bench("run", name, *options, "--no-report")).returncode
            del missing[name]
            if failed:
                missing[name] = "it failed; see above"
    return missing


def measure_into(folder: Path, name: str, dataset: str, quick: bool) -> None:
    """Run one study and add its result to the run in the folder."""
    images = load_dataset(dataset)
    images = limited(images, 6_000) if quick else images
    if busy := busy_now():
        print_result(f"warning: {busy}; the timings will be flagged")
    print_result(f"{name} ...")
    result, conditions = under_conditions(lambda: study(name).measure(images, quick), images.name, quick)
    before = existing_run(folder)
    sections = {**before.sections, name: Section(conditions, result)}
    save(folder, machine(), dataclasses.replace(before, sections=sections))


@app.command()
def results(
    runs: Annotated[int, typer.Option(min=1, help="Number of runs; a claim holds only if all agree.")] = 3,
    dataset: DatasetName = "mnist",
    output: Annotated[
        Path | None,
        typer.Option(parser=parse_path, metavar="FOLDER", help="Folder [default: bench/results/MACHINE]."),
    ] = None,
    quick: Annotated[bool, typer.Option(help="Smoke test: little work, not to publish: into bench/output.")] = False,
) -> None:
    """Run all studies on this machine and write a folder of results to publish."""
    commit = environment().commit
    if not quick and (not commit or commit.endswith("-dirty")):
        raise RecordError(f"published runs need a clean commit, but this is {commit or 'unknown'}: commit first")
    restrictions = [name for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES") if os.environ.get(name)]
    if restrictions and not output:
        raise RecordError(
            f"runs with {' and '.join(restrictions)} do not belong in the folder of the unrestricted CPU: "
            "unset this, or name another folder with --output"
        )
    folder = output or (DEFAULT / "quick-results" if quick else Path(__file__).parent / "results") / slug(machine())
    existing_run(folder)
    load_dataset(dataset)
    failures: dict[str, str] = {}
    for number in range(runs):
        scratch = Path("bench/output/measuring") / f"{number + 1}"
        shutil.rmtree(scratch, ignore_errors=True)
        names = [name for name in STUDIES if number == runs - 1 or name in EVERY_RUN]
        print_result(f"run {number + 1} of {runs}: {', '.join(names)}")
        options = ["--dataset", dataset, "--output", str(scratch), "--no-report", *["--quick"] * quick]
        subprocess.run(_bench("run", *names, *options))
        failures |= add_run(folder, scratch / "quick" if quick else scratch, names)
    make_folder(DEFAULT)
    if not quick:
        print_result(f"to publish: run make publish, then commit the documents and {folder}")
    drawn = show(folder, DEFAULT, failures)
    if failures or not drawn:
        raise typer.Exit(1)


def add_run(folder: Path, measured: Path, names: list[str]) -> dict[str, str]:
    """Copy the run in `measured`, if it has any results, into `folder`; returns why some of its studies have none."""
    run = existing_run(measured)
    skipped = {name: "the study failed" for name in names if name not in run.sections}
    if run.sections:
        date = min(section.conditions.date for section in run.sections.values())[:10]
        earlier = [numbered(file)[1] for file in folder.glob(f"run-{date}-*.json")]
        new = folder / f"run-{date}-{max(earlier, default=0) + 1}.json"  # some of that day may have been removed
        write(new, dataclasses.replace(run, skipped=skipped))
        write(folder / MACHINE, read(Machine, measured / MACHINE))
    return skipped


@app.command()
def draw(
    folder: Annotated[
        Path,
        typer.Argument(parser=parse_path, metavar="FOLDER", help="A folder of results, from this machine or another."),
    ],
    output: Output = DEFAULT,
) -> None:
    """Draw every figure that the folder has data for, and write the report."""
    make_folder(output)
    if not show(folder, output, {}):
        raise typer.Exit(1)


@app.command()
def publish() -> None:
    """Update the READMEs' tables and figures from all of bench/results/."""
    from bench.publish import tables  # imports compiled kernels, which the other commands can do without

    results, failures = tables.PUBLISHED_RESULTS, list[str]()
    documents = [tables.ROOT / document for document in tables.DOCUMENTS]
    texts = {file: tables.refresh(file.read_text(encoding="utf-8"), results) for file in documents}
    draw_all(tables.main_folder(results), results, failures.append, tables.folders(results))
    for file, text in texts.items():
        write_atomically(file, text.encode())
    for line in failures:
        print_result(line)
    if failures:
        raise typer.Exit(1)


def show(folder: Path, output: Path, missing: dict[str, str]) -> bool:
    """Draw the figures, write the report, and print their paths, the report's last; returns whether all were drawn."""
    measured, failures = read_folder(folder), list[str]()
    figures = draw_all(measured, output, failures.append)
    report = write_report(measured, figures, output, missing)
    for line in (*failures, *sorted(map(str, figures.values())), f"report: {report}"):
        print_result(line)
    return not failures


def _bench(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "bench", *arguments]


def main() -> None:
    """Run the command line; every expected error is one line on stderr and exit code 2."""
    print_any_name()
    usage_error: Any = typer.BadParameter.__base__  # base class of all usage errors; its module was renamed
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        if code == 128 + signal.SIGINT:  # typer turns a KeyboardInterrupt into this code
            print("interrupted", file=sys.stderr)
        sys.exit(code)
    except usage_error as error:
        fail(error.format_message())
    except (DataError, RecordError, ValueError, OSError) as error:
        fail(str(error))
    except (MemoryError, OverflowError) as error:
        fail(f"too large for this machine ({str(error) or 'out of memory'}): end other programs, or raise its limit")
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().splitlines()[-1:]  # if not captured, it is already on the terminal
        fail(": ".join([f"exit code {error.returncode} of {shlex.join(map(str, error.cmd))}", *last]))
    except BrokenProcessPool:
        fail("a process that measures ended early: the system may have been out of memory")
