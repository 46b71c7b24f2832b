"""The command line: ``python -m model train`` and ``python -m model reproduce``."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from kernels import backend_names, get_backend
from model.data import DataError, limited, load_dataset
from model.files import check_writable
from model.mlp import MLP
from model.report import comparison_table, history_table, run_report, write_json
from model.reproduction import FITTED, FULL_BATCH, MINI_BATCH, run
from model.trainer import TrainingError, available_cores, train

app = typer.Typer(
    help="Train a small neural network on MNIST, with its kernels written in different ways.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)

Threads = Annotated[
    int | None,
    typer.Option(help="Threads that share the work; the result is the same. [default: one per core]"),
]
DatasetName = Annotated[
    str,
    typer.Option(help="mnist, digits28 (a stand-in that needs no network), or auto: MNIST if it can be had."),
]
DataFolder = Annotated[
    Path | None, typer.Option(help="Folder with the MNIST files. [default: $MNIST_DIR, else downloaded once]")
]


@app.command("train")
def train_command(
    backend: Annotated[
        str,
        typer.Option(help=f"Who computes: {', '.join(backend_names())}, or package.module:Class for your own."),
    ] = "numpy",
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 250,
    learning_rate: Annotated[float, typer.Option(help="How far each step goes down the mean gradient.")] = 0.3,
    batch_size: Annotated[int | None, typer.Option(help="Images per step. [default: all, one step an epoch]")] = None,
    limit: Annotated[int | None, typer.Option(help="Train on the first so many images only.")] = None,
    hidden: Annotated[int, typer.Option(help="Units in the hidden layer.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random start and of the shuffling.")] = 0,
    threads: Threads = None,
    eval_every: Annotated[int, typer.Option(help="Measure the test accuracy after every so many epochs.")] = 1,
    dataset: DatasetName = "auto",
    data: DataFolder = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the history to this file.")] = None,
) -> None:
    """Train the network and show how its accuracy grows."""
    threads = available_cores() if threads is None else threads
    protocol = {
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "seed": seed,
        "threads": threads,
        "eval_every": eval_every,
    }
    if json_file:
        check_writable(json_file)
    kernels = get_backend(backend)
    images = limited(load_dataset(dataset, data), limit)
    mlp = MLP((images.train_images.shape[1], hidden, 10), seed)
    with progress_bar(f"{backend} on {images.name}", epochs * len(images.train_images)) as on_images:
        history = train(mlp, kernels, images, on_images=on_images, **protocol)  # type: ignore[arg-type]
    out.print(history_table(history, f"{backend} on {images.name}, {threads} threads"))
    if json_file:
        config = {"backend": backend, "dataset": images.name, "limit": limit, "hidden": hidden, **protocol}
        write_json(json_file, run_report(history, kernels, config))
        out.print(f"history written to {json_file}")


@app.command("reproduce")
def reproduce_command(
    backend: Annotated[list[str] | None, typer.Option(help="Run this one; may be repeated. [default: all]")] = None,
    starts: Annotated[int, typer.Option(min=1, help="Random starts of the band in the plot.")] = 10,
    threads: Threads = None,
    dataset: DatasetName = "auto",
    data: DataFolder = None,
    output: Annotated[Path, typer.Option(help="Folder for the plot and the JSON file.")] = Path("bench/output"),
) -> None:
    """Run the published experiment on every backend, beside the published accuracies."""
    from model.figures import draw_curves  # matplotlib takes a second to import

    backends = {name: get_backend(name) for name in backend or backend_names()}
    output.mkdir(parents=True, exist_ok=True)
    json_file, figure = output / "reproduction.json", output / "reproduction.png"
    check_writable(json_file)
    images = load_dataset(dataset, data)

    def run_with_progress(protocol, name, seed=0):
        kind = "full batch" if protocol is FULL_BATCH else "mini-batches"
        with progress_bar(f"{name}, {kind}, start {seed}", protocol.images_seen(images)) as on_images:
            return run(protocol, backends[name], images, seed, threads, on_images)[1]

    reports = {}
    histories = {name: run_with_progress(FULL_BATCH, name) for name in backends if name != "naive"}
    if histories:
        out.print(comparison_table(histories, images.name))
        fastest = min(histories, key=lambda name: median(epoch.seconds for epoch in histories[name].epochs))
        others = [run_with_progress(FULL_BATCH, fastest, seed) for seed in range(1, starts)]
        draw_curves(figure, histories, [histories[fastest], *others], images.name)
        reports = {
            name: run_report(history, backends[name], FULL_BATCH._asdict()) for name, history in histories.items()
        }
    if "naive" in backends:
        history = run_with_progress(MINI_BATCH, "naive")
        reports["naive"] = run_report(history, backends["naive"], MINI_BATCH._asdict())
        (epoch,) = history.epochs
        out.print(
            f"naive, one pass over {MINI_BATCH.images:,} images in mini-batches of {MINI_BATCH.batch_size}, learning "
            f"rate {MINI_BATCH.learning_rate}: {epoch.test_accuracy:.2%} test accuracy in {epoch.seconds:.0f} s"
        )
    if images.name != "MNIST":
        out.print(f"This run used {images.name}; the published accuracies are those of MNIST.")
    out.print(FITTED)
    write_json(json_file, {"dataset": images.name, "runs": reports})
    out.print(f"written: {json_file}" + (f" and {figure}" if histories else ""))


@contextmanager
def progress_bar(title: str, images: int) -> Iterator[Callable[[int], None]]:
    """A live bar over so many images on stderr, where that is a terminal; yields how to advance it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, *times, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task(title, total=images)
        yield lambda passed: progress.advance(task, passed)


def main() -> None:
    """Run the command line; every foreseeable error is one line on stderr and exit code 2."""
    usage_error: Any = typer.BadParameter.__base__  # the class of all wrong options; its module has changed name
    exit_code = 130
    try:
        exit_code = app(standalone_mode=False)
    except usage_error as error:
        fail(error.format_message())
    except (DataError, TrainingError, ValueError, OSError) as error:
        fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        pass  # some versions of typer return 130 instead
    if exit_code == 130:
        err.print("interrupted")
        os._exit(130)  # worker threads would first finish their shard, which takes pure Python minutes
    sys.exit(exit_code)


def fail(message: str) -> None:
    """Say what was wrong and end with exit code 2."""
    err.print(f"error: {message}", soft_wrap=True, markup=False, highlight=False)
    sys.exit(2)


if __name__ == "__main__":
    main()
