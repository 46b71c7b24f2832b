"""``python -m model train``."""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import typer

from kernels import get_backend
from kernels.backend import Backend
from model.cli import options as opt
from model.cli.console import counted, print_result, print_status, show
from model.cli.progress import training
from model.cli.tables import history_table
from model.data import Dataset, digests, limited, load_dataset, sha256
from model.environment import environment
from model.extras.checkpoint import Checkpoint, Config, check_same, load, save
from model.files import check_replaceable, check_writable, locked, same_file, write_json
from model.mlp import MLP
from model.signals import stop
from model.threads import available_cores
from model.training import History, State, TrainingError, train

SAVE_SECONDS = 60


def train_command(
    context: typer.Context,
    backend: opt.BackendName = "numpy",
    epochs: opt.Epochs = 250,
    learning_rate: opt.LearningRate = 0.3,
    batch_size: opt.BatchSize = None,
    limit: opt.Limit = None,
    hidden: opt.Hidden = 128,
    seed: opt.Seed = 0,
    threads: opt.Threads = None,
    memory_limit: opt.MemoryLimit = None,
    scheduler: opt.Scheduler = None,
    workers: opt.Workers = None,
    eval_every: opt.EvalEvery = 1,
    dataset: opt.DatasetName = "auto",
    data: opt.DataFolder = None,
    json_file: opt.HistoryFile = None,
    checkpoint: opt.NewCheckpoint = None,
    checkpoint_every: opt.CheckpointEvery = None,
    resume: opt.Resume = None,
) -> None:
    """Train the network and show loss and accuracy by epoch."""
    check_files(checkpoint, resume, json_file, checkpoint_every)
    file = checkpoint or resume
    for written in filter(None, (file, json_file)):
        context.with_resource(locked(written))  # before the checkpoint is read
    saved = load(resume) if resume else None
    settings = given_settings(context, saved)
    check_cluster(scheduler, workers, settings["batch_size"])
    kernels = get_backend(settings["backend"])
    whole = load_dataset(settings["dataset"], data)
    images = limited(whole, settings["limit"])
    settings |= {"backend": kernels.name, "dataset": whole.name.lower()}
    threads = available_cores() if threads is None else threads
    title = f"{kernels.name} on {images.name}"
    with ExitStack() as stack:
        cluster = stack.enter_context(cluster_of(scheduler, workers, threads))
        digests_of = cluster.digests if cluster else digests
        config = Config(**settings, data_sha256=sha256(whole, digests_of) if file else "")
        run = resumed(saved, config, resume) if saved else new_run(config, whole)
        received, on_images = stack.enter_context(training(title, *images_to_pass(run, images)))
        history = train(
            run.mlp,
            kernels,
            images,
            epochs=config.epochs,
            learning_rate=config.learning_rate,
            batch_size=config.batch_size,
            seed=config.seed,
            eval_every=config.eval_every,
            threads=threads,
            memory_limit=memory_limit,
            batches=cluster.batch if cluster else None,
            state=run.state,
            on_images=on_images,
            on_step=between_steps(file, checkpoint_every, run, received),
        )
    where = scheduler or (counted(workers, "worker") if workers else counted(threads, "thread"))
    try:
        if json_file:  # before anything is printed: stdout may be closed
            report = run_report(history, kernels, {**settings, "dataset": images.name, "threads": threads})
            write_json(json_file, report)
    finally:  # even if the disk is full
        show(history_table(history, f"{title}, {where}"))
    if file:
        print_result(f"checkpoint written to {file}")
    if json_file:
        print_result(f"history written to {json_file}")


def given_settings(context: typer.Context, saved: Checkpoint | None) -> dict[str, Any]:
    """The settings of a run: from the command line, else from the checkpoint, else the defaults."""
    settings = {name: context.params[name] for name in Config._fields if name in context.params}
    if saved:
        sources = {name: context.get_parameter_source(name) for name in settings}
        unset = {name for name, source in sources.items() if not source or source.name == "DEFAULT"}
        settings |= {name: value for name, value in saved.config._asdict().items() if name in unset}
        if "backend" in unset and ":" in settings["backend"]:  # a file must not choose the code to import
            raise ValueError(f"this run uses a custom backend: add --backend {settings['backend']!r}")
    return settings


def check_files(checkpoint: Path | None, resume: Path | None, json_file: Path | None, every: int | None) -> None:
    """Raise an error, before any work is lost, if an output cannot be written or would overwrite another file."""
    if resume and not os.path.isfile(resume):  # Path.is_file would raise an error for a name that is too long
        load(resume)  # raises the error that explains it
    for written in filter(None, (checkpoint or resume, json_file)):
        check_writable(written)
    if checkpoint and checkpoint.exists() and not (resume and same_file(checkpoint, resume)):
        raise ValueError(f"{checkpoint} exists: resume it with --resume {checkpoint}, or choose a new file")
    for run in filter(None, (checkpoint, resume)):
        if json_file and same_file(json_file, run):
            raise ValueError(f"--json {json_file} is the checkpoint {run}: choose another file for the history")
    if json_file:
        check_replaceable(json_file, "history")
    if every and not (checkpoint or resume):
        raise ValueError("--checkpoint-every needs --checkpoint FILE")


def check_cluster(scheduler: str | None, workers: int | None, batch_size: int | None) -> None:
    """Raise a ValueError, before a cluster is started, if the options do not go together."""
    if scheduler == "":
        raise ValueError("--scheduler needs an address, as in tcp://HOST:8786")
    if scheduler and workers:
        raise ValueError("--workers starts a new cluster: use either --workers or --scheduler")
    if (scheduler or workers) and batch_size:
        raise ValueError("mini-batches take longer to send than to compute: leave out --batch-size, or the workers")


def new_run(config: Config, images: Dataset) -> Checkpoint:
    """A new run, before its first step."""
    mlp = MLP((images.train_images.shape[1], config.hidden, images.classes), config.seed)
    return Checkpoint(mlp, State.start(config.seed), config)


def resumed(saved: Checkpoint, config: Config, file: Path | None) -> Checkpoint:
    """The saved run with these settings, which may ask for more epochs."""
    check_same(saved.config, config)
    if len(saved.state.history.epochs) == config.epochs and not saved.state.steps:
        print_status(f"{file} is finished: all {config.epochs} epochs are done; raise --epochs to train further")
    return saved._replace(config=config)


def images_to_pass(run: Checkpoint, images: Dataset) -> tuple[int, int]:
    """How many images pass through the network in all epochs of a run, and how many have so far."""
    count = len(images.train_images)
    passed = min(run.state.steps * (run.config.batch_size or count), count)
    return run.config.epochs * count, len(run.state.history.epochs) * count + passed


@contextmanager
def cluster_of(scheduler: str | None, workers: int | None, threads: int) -> Iterator[Any]:
    """The `model.extras.dask_workers.Cluster` to train on, or None for this process."""
    if scheduler is None and workers is None:
        yield None
        return
    try:
        from model.extras.dask_workers import connect  # nothing else needs Dask
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error}: training on workers needs Dask; install it with: pip install -e '.[distributed]'"
        ) from error
    with connect(scheduler, workers, threads) as cluster:
        if workers:
            print_status(f"dashboard: {cluster.client.dashboard_link}")
        yield cluster


def between_steps(
    file: Path | None, every: int | None, run: Checkpoint, received: list[int]
) -> Callable[[State], None]:
    """An `on_step` for `train`: saves before the first step, when a save is due, and at the end; stops on a signal."""
    saved = -math.inf

    def on_step(state: State) -> None:
        nonlocal saved
        asked = received[:1]  # read once, as a signal may arrive at any moment
        epochs = len(state.history.epochs)
        finished = epochs == run.config.epochs
        due = time.monotonic() - saved >= SAVE_SECONDS or (every and state.steps == 0 and epochs % every == 0)
        if file and (due or finished or asked):
            check_finite(run)
            save(file, run.mlp, state, run.config)
            saved = time.monotonic()
        if asked and not finished:
            stop(asked[0], f", saved in {file}: continue with --resume {file}" if file else "")

    return on_step


def check_finite(run: Checkpoint) -> None:
    """Raise a TrainingError if a parameter is not finite: a checkpoint rejects it, and the loss may not show it yet."""
    if not all(np.isfinite(parameter).all() for parameter in run.mlp.parameters):
        rate = run.config.learning_rate
        raise TrainingError(f"the parameters became infinite with learning rate {rate:g}: try a smaller learning rate")


def run_report(history: History, backend: Backend, config: dict[str, Any]) -> dict[str, Any]:
    """Everything about a run as plain data, for `write_json`."""
    return {
        "config": config,
        "environment": dataclasses.asdict(environment()),
        "prepare_seconds": history.prepare_seconds,
        "compile_seconds": backend.compile_seconds,
        "history": [epoch._asdict() for epoch in history.epochs],
    }
