"""``python -m model reproduce``."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from kernels import backend_names, get_backend
from model.cli import options as opt
from model.cli.console import print_result, print_status, show
from model.cli.progress import training
from model.cli.tables import comparison_table, mini_batch_line
from model.data import load_dataset
from model.environment import environment
from model.files import check_replaceable, check_writable, locked, make_folder, write_json
from model.published import FITTED, Reproduction, full_batch_histories, reproduce
from model.signals import stop
from model.training import State


def reproduce_command(
    context: typer.Context,
    backend: opt.BackendNames = None,
    starts: opt.Starts = 10,
    threads: opt.Threads = None,
    dataset: opt.DatasetName = "auto",
    data: opt.DataFolder = None,
    output: opt.OutputFolder = Path("bench/output"),
) -> None:
    """Run the published experiment on every backend and compare the accuracies."""
    from model.extras.figure import draw_curves  # matplotlib takes a second to import

    backends = {name: get_backend(name) for name in backend or backend_names()}
    make_folder(output)
    json_file, figure = output / "reproduction.json", output / "reproduction.png"
    partial = output / "reproduction.partial.json"  # until all runs are finished, to keep the last complete report
    for file in (json_file, partial, figure):
        check_writable(file)
    for file in (json_file, partial):
        check_replaceable(file, "runs")
    context.with_resource(locked(json_file))
    images = load_dataset(dataset, data)
    finished: list[str] = []

    def save_partial(report: Reproduction) -> None:
        write_json(partial, as_json(report))
        finished[:] = report.runs

    try:
        report = reproduce(backends, images, starts, threads, stoppable_run, save_partial)
    except BaseException:
        if finished:
            print_status(f"finished before that: {', '.join(finished)}; the results are in {partial}")
        raise
    histories = full_batch_histories(report)
    try:  # before anything is printed: stdout may be closed
        write_json(json_file, as_json(report))
        partial.unlink(missing_ok=True)
        if histories:
            draw_curves(figure, report)
    finally:  # even if the disk is full
        show_results(report)
    print_result(f"wrote {json_file}" + (f" and {figure}" if histories else ""))


def show_results(report: Reproduction) -> None:
    """Print the accuracies of all runs beside the published ones."""
    histories = full_batch_histories(report)
    if histories:
        show(comparison_table(histories, report.dataset))
    for name, run in report.runs.items():
        if name not in histories:
            print_result(mini_batch_line(name, run))
    if report.dataset != "MNIST":
        print_result(f"This run used {report.dataset}; the published accuracies are for MNIST.")
    print_result(FITTED)


def as_json(report: Reproduction) -> dict[str, Any]:
    """The report with the environment of this run, for `write_json`."""
    return {"environment": dataclasses.asdict(environment()), **dataclasses.asdict(report)}


@contextmanager
def stoppable_run(title: str, images: int) -> Iterator[tuple[Callable[[int], None], Callable[[State], None]]]:
    """A progress bar for a run of `reproduce`; a signal stops the run after the current step."""
    with training(title, images) as (received, on_images):

        def on_step(state: State) -> None:
            if received:
                stop(received[0])

        yield on_images, on_step
