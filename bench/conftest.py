"""Options and data of the benchmarks; afterwards their results are drawn."""

import json
import os
from pathlib import Path

import pytest

from bench import RESULTS
from model.data import DataError, limited, load_dataset
from model.extras.environment import environment
from model.threads import available_cores, thread_pool


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="fewer images and rounds: a minute in all, only to try it")
    parser.addoption("--dataset", default="auto", help="mnist, digits28 or auto, as in python -m model train")
    parser.addoption(
        "--output", type=Path, default=Path(__file__).parent / "output", help="folder for results and plots"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    option = config.option
    if not (option.collectonly or option.benchmark_disable or option.benchmark_json):
        option.output.mkdir(parents=True, exist_ok=True)
        option.benchmark_json = str(option.output / RESULTS)


def pytest_benchmark_update_machine_info(machine_info):
    machine_info.clear()
    machine_info.update(environment())


def pytest_benchmark_update_json(config, output_json):
    output_json["quick"] = config.option.quick
    file = Path(config.option.benchmark_json)
    if file.exists():  # the studies in it were not made again
        output_json["studies"] = json.loads(file.read_text()).get("studies", {})
    for result in output_json["benchmarks"]:
        info = result["extra_info"]
        info["gflop_per_second"] = info["flop"] / result["stats"]["median"] / 1e9


def pytest_terminal_summary(terminalreporter, config):
    file = config.option.benchmark_json
    if file and config._benchmarksession.benchmarks:
        from bench.publish.figures import draw_benchmarks  # matplotlib takes a second to import

        figures = draw_benchmarks(Path(file), Path(file).parent)
        names = ", ".join(figure.name for figure in figures)
        terminalreporter.write_line(f"Results and plots: {os.path.relpath(file)}, {names}")


@pytest.fixture(scope="session")
def quick(request):
    """Whether to be done in a minute, only to see that everything works."""
    return request.config.option.quick


@pytest.fixture(scope="session")
def dataset(request, quick):
    """The images to measure on; a tenth of them if `quick`."""
    try:
        whole = load_dataset(request.config.option.dataset)
    except DataError as error:
        pytest.exit(str(error), returncode=2)
    return limited(whole, 6_000) if quick else whole


@pytest.fixture
def one_thread():
    """Kernels are measured as a training thread calls them: BLAS held to one thread, freed memory kept."""
    with thread_pool(1):
        yield


@pytest.fixture(scope="session")
def threads():
    """All cores."""
    return available_cores()
