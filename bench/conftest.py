"""Options and fixtures of the benchmarks. Recorded timings come from the studies, the table from pytest-benchmark."""

import dataclasses
import os
from pathlib import Path

import pytest

from bench.studies import DATASETS, STUDIES
from kernels import backend_names
from model.data import DataError, limited, load_dataset
from model.environment import environment
from model.files import parse_path
from model.threads import thread_pool

RECORDED = ("kernels", "epochs", "ladder")
SECTIONS = pytest.StashKey[dict]()


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="smoke test: fewer images and rounds, about a minute")
    parser.addoption("--dataset", default="auto", choices=DATASETS, help="as in python -m model train")
    parser.addoption(
        "--output", type=parse_path, default=Path(__file__).parent / "output", help="folder for results and plots"
    )


def measures(config):
    """Whether benchmarks will be timed."""
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("the benchmarks need pytest-benchmark: drop -p no:benchmark")
    return not (config.option.collectonly or config.option.benchmark_disable)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.stash[SECTIONS] = {}
    if measures(config):
        from bench.measure.records import RecordError
        from bench.publish.folder import existing_run

        try:  # before anything is measured
            for folder in (config.option.output, config.option.output / "quick", config.option.output / "partial"):
                existing_run(folder)
        except (RecordError, OSError) as error:
            raise pytest.UsageError(str(error)) from error


def pytest_benchmark_update_machine_info(machine_info):
    machine_info.clear()
    machine_info.update(dataclasses.asdict(environment()))


def pytest_benchmark_group_stats(benchmarks):
    """A table for each benchmark and its earlier runs. A shared one would print ratios of what was not interleaved."""
    tables = {}
    for each in benchmarks:
        tables.setdefault(f"{each['group']}: {each['name']}", []).append(each)
    return list(tables.items())


def pytest_deselected(items):
    if items:
        items[0].config.stash[SECTIONS]["deselected"] = True


def record(request, name, dataset, quick, **options):
    """Run the study behind the selected benchmarks, and keep its result for the report."""
    from bench.measure.machine import busy_now, under_conditions
    from bench.measure.records import Section
    from bench.studies import study

    config = request.config
    if config.option.benchmark_disable:
        return
    if busy := busy_now():
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        reporter.write_line(f"\nwarning: {busy}; the timings will be flagged")
    result, conditions = under_conditions(lambda: study(name).measure(dataset, quick, **options), dataset.name, quick)
    config.stash[SECTIONS][name] = Section(conditions, result)


def selected(request, fixture, parameter):
    """The values that a parameter takes in the selected benchmarks that use a fixture, in order."""
    items = [item for item in request.session.items if fixture in item.fixturenames]
    return list(dict.fromkeys(item.callspec.params[parameter] for item in items))


@pytest.fixture(scope="session")
def kernels(request, dataset, quick):
    names, which = selected(request, "kernels", "backend"), selected(request, "kernels", "name")
    record(request, "kernels", dataset, quick, names=names, kernels=which)


@pytest.fixture(scope="session")
def epochs(request, dataset, quick):
    record(request, "epochs", dataset, quick, names=selected(request, "epochs", "backend"))


@pytest.fixture(scope="session")
def ladder(request, dataset, quick):
    record(request, "ladder", dataset, quick)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, exitstatus, config):
    """Save the results, draw them, and print the path of the report. An error here is one line; the table stays."""
    stash = config.stash[SECTIONS]
    sections = {name: stash[name] for name in RECORDED if name in stash}
    if not sections:
        return
    from bench.measure.machine import machine
    from bench.measure.records import Run
    from bench.publish.figures import draw_all
    from bench.publish.folder import existing_run, read_folder, save
    from bench.publish.report import write_report

    all_backends = "epochs" in sections and set(backend_names()) <= set(sections["epochs"].result.epochs.seconds)
    complete = exitstatus == 0 and all_backends and len(sections) == len(RECORDED) and "deselected" not in stash
    folder = config.option.output / (("quick" if config.option.quick else "") if complete else "partial")
    try:
        run = existing_run(folder) if complete else Run()
        run.sections.update(sections)
        save(folder, machine(), run)
        if not complete:
            terminalreporter.write_line("A partial run: saved separately, the last complete run is unchanged.")
        missing = {name: "run `make results`, which runs all" for name in STUDIES if name not in run.sections}
        missing |= {name: "not selected, or the run ended first" for name in RECORDED if name not in run.sections}
        measured = read_folder(folder)
        figures = draw_all(measured, folder, terminalreporter.write_line)
        report = write_report(measured, figures, folder, missing)
        terminalreporter.write_line(f"Results and plots: {os.path.relpath(folder)}{os.sep}")
        terminalreporter.write_line(f"Report: {os.path.relpath(report)}")
    except Exception as error:
        pytest.exit(f"not all results were written: {type(error).__name__}: {error}", returncode=1)


@pytest.fixture(scope="session")
def quick(request):
    """Whether this is a smoke test of about a minute."""
    return request.config.option.quick


@pytest.fixture(scope="session")
def dataset(request, quick):
    """The data set to measure on; at most 6,000 training images if `quick`."""
    try:
        whole = load_dataset(request.config.option.dataset)
    except DataError as error:
        pytest.exit(str(error), returncode=2)
    return limited(whole, 6_000) if quick else whole


@pytest.fixture
def one_thread():
    """The conditions in a training thread: BLAS is limited to one thread, and malloc keeps freed memory."""
    with thread_pool(1):
        yield
