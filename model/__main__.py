"""The command line: ``python -m model train``, ``reproduce`` and ``predict``."""

import gc
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
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
from model.checkpoint import CheckpointError, Config, check_same, load, save
from model.data import DataError, limited, load_dataset, sha256
from model.files import check_writable
from model.mlp import MLP
from model.report import comparison_table, environment, history_table, probability_bars, run_report, write_json
from model.reproduction import FITTED, MINI_BATCH, full_batch_histories, history, reproduce
from model.signals import Stopped, stop, stoppable, stoppable_between_steps
from model.trainer import Batch, State, TrainingError, available_cores, train

app = typer.Typer(
    help="Train a small neural network on MNIST, with its kernels written in different ways.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)

SAVE_SECONDS = 60
SURE = 0.8  # below this probability, predict names the second guess too
BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

Threads = Annotated[
    int | None,
    typer.Option(help="Threads that share the work; the result is the same. [default: one per core]"),
]
DatasetName = Annotated[
    str,
    typer.Option(
        help="mnist, digits28 (a stand-in that needs no network), auto: MNIST if it can be had, or idx: other files in "
        "MNIST's format, with any number of images, mapped into memory."
    ),
]
DataFolder = Annotated[
    Path | None, typer.Option(help="Folder with the files. [default: $MNIST_DIR, else MNIST is downloaded once]")
]


def parse_bytes(text: str) -> int:
    """A number of bytes, as in "500 MB"."""
    match = re.fullmatch(rf"(\d+(?:\.\d+)?) *({'|'.join(BYTES)})?", text)
    if not match:
        raise typer.BadParameter(f"{text!r} is no number of bytes: give one as in '500 MB' or '2 GiB'")
    return int(float(match[1]) * BYTES[match[2] or "B"])


@app.command("train")
def train_command(
    context: typer.Context,
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
    memory_limit: Annotated[
        int | None,
        typer.Option(
            parser=parse_bytes,
            metavar="BYTES",
            help="Keep no more prepared images than this in a process, as in '500 MB'; prepare the others each epoch.",
        ),
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Train on the workers of a Dask cluster: the address, as in tcp://HOST:8786.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Train on so many Dask workers, started on this machine, to try it.")
    ] = None,
    eval_every: Annotated[int, typer.Option(help="Measure the test accuracy after every so many epochs.")] = 1,
    dataset: DatasetName = "auto",
    data: DataFolder = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the history to this file.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Save the run in this new file, now and then.")] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(min=1, help="Save after every so many epochs too, besides once a minute and at the end."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the run in this file, with its settings, and save it there.")
    ] = None,
) -> None:
    """Train the network and show how its accuracy grows."""
    threads = available_cores() if threads is None else threads
    options: dict[str, Any] = {
        "backend": backend,
        "dataset": dataset,
        "limit": limit,
        "hidden": hidden,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "seed": seed,
        "eval_every": eval_every,
    }
    saved = load(resume) if resume else None
    if saved:
        options |= settings_not_given(context, saved.config)
    file = checkpoint or resume
    for written in filter(None, (file, json_file)):
        check_writable(written)
    if checkpoint and checkpoint != resume and checkpoint.exists():
        raise ValueError(f"{checkpoint} exists: --resume {checkpoint} goes on with it; for a new run name a new file")
    if checkpoint_every and not file:
        raise ValueError("--checkpoint-every goes with --checkpoint FILE")
    kernels = get_backend(options["backend"])
    whole = load_dataset(options["dataset"], data)
    images = limited(whole, options["limit"])
    names = {"backend": kernels.name, "dataset": whole.name.lower()}
    config = Config(**{**options, **names}, data_sha256=sha256(whole) if file else "")
    if saved:
        check_same(saved.config, config)
    mlp, state, _ = saved or (MLP((images.train_images.shape[1], hidden, 10), seed), State.start(seed), config)
    if saved and len(state.history.epochs) == config.epochs and not state.steps:
        say(f"{resume} is finished: its {config.epochs} epochs are done, --epochs with more goes on")
    count = len(images.train_images)
    passed = len(state.history.epochs) * count + min(state.steps * (config.batch_size or count), count)
    protocol = {name: options[name] for name in ("epochs", "learning_rate", "batch_size", "seed", "eval_every")}
    protocol |= {"threads": threads}
    title = f"{config.backend} on {images.name}"
    with (
        batches_on(scheduler, workers, threads) as batches,
        training(title, config.epochs * count, passed) as (received, on_images),
    ):
        on_step = between_steps(file, checkpoint_every, mlp, config, received)
        hooks: dict[str, Any] = {"batches": batches, "on_images": on_images, "on_step": on_step}
        history = train(mlp, kernels, images, **protocol, memory_limit=memory_limit, state=state, **hooks)
    out.print(history_table(history, f"{title}, {scheduler or f'{threads} threads'}"))
    if file:
        out.print(f"checkpoint written to {file}", soft_wrap=True)
    if json_file:
        settings = {"dataset": images.name, **{name: options[name] for name in ("backend", "limit", "hidden")}}
        write_json(json_file, run_report(history, kernels, {**settings, **protocol}))
        out.print(f"history written to {json_file}")


@contextmanager
def batches_on(scheduler: str | None, workers: int | None, threads: int) -> Iterator[Callable[..., Batch] | None]:
    """For `train`: what makes batches on the workers of a cluster, or None for those in this process."""
    if scheduler is None and workers is None:
        yield None
        return
    if scheduler and workers:
        raise ValueError("--workers starts a cluster of its own: leave it out, or --scheduler")
    try:
        from model.distributed import connect  # Dask is needed for nothing else
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error}: training on workers needs Dask, install it by: pip install -e '.[distributed]'"
        ) from error
    with connect(scheduler, workers, threads) as cluster:
        if workers:
            say(f"dashboard: {cluster.client.dashboard_link}")
        yield cluster.batch


def settings_not_given(context: typer.Context, config: Config) -> dict[str, Any]:
    """Those of a checkpoint that the command line leaves open."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name for name, source in sources.items() if source and source.name != "DEFAULT"}
    settings = {name: value for name, value in config._asdict().items() if name in sources and name not in given}
    if ":" in settings.get("backend", ""):  # a file does not decide what code is imported
        raise ValueError(f"this run needs a backend of your own: add --backend {settings['backend']!r}")
    return settings


def between_steps(
    file: Path | None, every: int | None, mlp: MLP, config: Config, received: list[int]
) -> Callable[[State], None]:
    """For `train`: saves before the first step, when it is time to, and at the end; stops for a signal."""
    saved = -math.inf

    def on_step(state: State) -> None:
        nonlocal saved
        asked = received[:1]  # looked at once: a signal may arrive at any moment
        epochs = len(state.history.epochs)
        finished = epochs == config.epochs
        due = time.monotonic() - saved >= SAVE_SECONDS or (every and state.steps == 0 and epochs % every == 0)
        if file and (due or finished or asked):
            save(file, mlp, state, config)
            saved = time.monotonic()
        if asked and not finished:
            stop(asked[0], f", saved in {file}: --resume {file} goes on" if file else "")

    return on_step


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
    found = reproduce(backends, images, starts, threads, stoppable_run)
    if histories := full_batch_histories(found):
        out.print(comparison_table(histories, images.name))
        draw_curves(figure, found)
    if "naive" in backends:
        (epoch,) = history(found["runs"]["naive"]).epochs
        out.print(
            f"naive, one pass over {MINI_BATCH.images:,} images in mini-batches of {MINI_BATCH.batch_size}, learning "
            f"rate {MINI_BATCH.learning_rate}: {epoch.test_accuracy:.2%} test accuracy in {epoch.seconds:.0f} s"
        )
    if images.name != "MNIST":
        out.print(f"This run used {images.name}; the published accuracies are those of MNIST.")
    out.print(FITTED)
    write_json(json_file, {"environment": environment(), **found})
    out.print(f"written: {json_file}" + (f" and {figure}" if histories else ""))


@contextmanager
def stoppable_run(title: str, images: int) -> Iterator[tuple[Callable[[int], None], Callable[[State], None]]]:
    """A bar for a run of `reproduce`, which a signal stops after the running step."""
    with training(title, images) as (received, on_images):

        def on_step(state: State) -> None:
            if received:
                stop(received[0])

        yield on_images, on_step


@app.command("predict")
def predict_command(
    picture: Annotated[Path, typer.Argument(help="PNG or JPEG of one digit, of any size, on any plain background.")],
    checkpoint: Annotated[Path, typer.Option(help="The trained network, as saved by train --checkpoint.")],
) -> None:
    """Say which digit a picture shows."""
    from model.picture import read_picture  # SciPy takes an eighth of a second to import

    run = load(checkpoint)
    mlp = run.mlp
    if (mlp.layers[0][0].shape[0], len(mlp.layers[-1][1])) != (784, 10):
        raise ValueError(
            f"{checkpoint}: its network is not for digits of 28 x 28 pixels. Train one on mnist or digits28"
        )
    (probabilities,) = mlp.probabilities(get_backend("numpy"), read_picture(picture)[None])
    if np.isnan(probabilities).any():
        raise ValueError(f"{checkpoint}: its parameters are too large to compute with. Use another checkpoint")
    second, first = np.argsort(probabilities)[-2:]
    unsure = f", or perhaps {second}: the network is unsure" if probabilities[first] < SURE else ""
    out.print(f"{picture} shows the digit {first}{unsure}", soft_wrap=True, markup=False, highlight=False)
    if run.config.dataset == "digits28":
        say(f"{checkpoint}: learned from digits28, and knows only about half of MNIST's digits. Train one on mnist")
    out.print(probability_bars(probabilities))


@contextmanager
def training(title: str, images: int, passed: int = 0) -> Iterator[tuple[list[int], Callable[[int], None]]]:
    """Signals wait for the running step, and a live bar over so many images is on stderr, where that is a terminal.

    Yields the list of the signals that wait, and how to advance the bar.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    bar = Progress(*columns, *times, console=err, transient=True, disable=not err.is_terminal)
    with stoppable_between_steps() as received, bar:
        task = bar.add_task(title, total=images, completed=passed)
        yield received, lambda passed: bar.advance(task, passed)


def main() -> None:
    """Run the command line; every foreseeable error is one line on stderr and exit code 2."""
    usage_error: Any = typer.BadParameter.__base__  # the class of all wrong options; its module has changed name
    with stoppable():
        try:
            sys.exit(app(standalone_mode=False))
        except usage_error as error:
            fail(error.format_message())
        except (CheckpointError, DataError, TrainingError, ValueError, OSError) as error:
            fail(str(error))
        except Stopped as stopped:
            say(f"interrupted{stopped.note}")
            os._exit(128 + stopped.signal)  # worker threads would finish their shard, which takes pure Python minutes


def fail(message: str) -> None:
    """Say what was wrong and end with exit code 2."""
    say(f"error: {message}")
    sys.exit(2)


def say(line: str) -> None:
    """Print the line as it is on stderr."""
    err.print(line, soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    # Numba makes a hundred thousand objects that stay. Looking for garbage among them takes a fifth of a second, most
    # of it when the process ends.
    gc.set_threshold(100_000)
    try:
        main()
    finally:
        gc.freeze()
