"""The options of the commands: their types and help texts."""

import re
from pathlib import Path
from typing import Annotated

import typer

from kernels import backend_names
from model.files import parse_path

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
MAX_COUNT = 2**63 - 1  # in a checkpoint


def parse_bytes(text: str) -> int:
    """A number of bytes, e.g. "500 MB"."""
    match = re.fullmatch(rf"(\d+(?:\.\d+)?) *({'|'.join(UNITS)})?", text)
    if not match:
        raise typer.BadParameter(f"{text!r} is not a number of bytes: write it like '500 MB' or '2 GiB'")
    return int(float(match[1]) * UNITS[match[2] or "B"])


BackendName = Annotated[
    str, typer.Option(help=f"The kernels: {', '.join(backend_names())}, or package.module:Class for your own.")
]
BackendNames = Annotated[list[str] | None, typer.Option(help="Run this backend; may be repeated. [default: all]")]
Epochs = Annotated[int, typer.Option(max=MAX_COUNT, help="Passes over the training images.")]
LearningRate = Annotated[float, typer.Option(help="Each step subtracts this times the mean gradient.")]
BatchSize = Annotated[int | None, typer.Option(help="Images per step. [default: all, one step per epoch]")]
Limit = Annotated[int | None, typer.Option(help="Train on only the first N images.", metavar="N")]
Hidden = Annotated[int, typer.Option(min=1, max=10**9, help="Units in the hidden layer.")]
Seed = Annotated[int, typer.Option(min=0, max=MAX_COUNT, help="Seed for the initial weights and the shuffling.")]
Starts = Annotated[int, typer.Option(min=1, help="Number of random seeds for the band in the plot.")]
Threads = Annotated[
    int | None, typer.Option(help="Number of threads; the result does not depend on it. [default: one per core]")
]
MemoryLimit = Annotated[
    int | None,
    typer.Option(
        parser=parse_bytes,
        metavar="BYTES",
        help="Maximum size of the prepared images to keep, e.g. '500 MB'; the rest are prepared again in each epoch.",
    ),
]
Scheduler = Annotated[str | None, typer.Option(help="Train on the Dask cluster at this address, e.g. tcp://HOST:8786.")]
Workers = Annotated[
    int | None, typer.Option(min=1, max=1024, help="Start this many Dask workers on this machine, and train on them.")
]
EvalEvery = Annotated[int, typer.Option(max=MAX_COUNT, help="Measure the test accuracy every N epochs.", metavar="N")]
DatasetName = Annotated[
    str,
    typer.Option(
        help="mnist; digits28, a stand-in that needs no download; auto, MNIST if available, else digits28; or idx, "
        "your own files in MNIST's format, of any size, memory-mapped."
    ),
]
DataFolder = Annotated[
    Path | None,
    typer.Option(
        parser=parse_path,
        metavar="FOLDER",
        help="Folder with the data files. [default: $MNIST_DIR, else MNIST is downloaded once]",
    ),
]
HistoryFile = Annotated[
    Path | None, typer.Option("--json", parser=parse_path, metavar="FILE", help="Write the history to this JSON file.")
]
NewCheckpoint = Annotated[
    Path | None,
    typer.Option(parser=parse_path, metavar="FILE", help="Save the run to this new file, every minute and at the end."),
]
CheckpointEvery = Annotated[int | None, typer.Option(min=1, help="Also save every N epochs.", metavar="N")]
Resume = Annotated[
    Path | None,
    typer.Option(
        parser=parse_path, metavar="FILE", help="Resume the run in this file, with its settings, and keep saving to it."
    ),
]
Trained = Annotated[
    Path, typer.Option(parser=parse_path, metavar="FILE", help="The trained network, saved by train --checkpoint.")
]
Picture = Annotated[
    Path,
    typer.Argument(
        parser=parse_path, metavar="PICTURE", help="PNG or JPEG of one digit, any size, on a plain background."
    ),
]
OutputFolder = Annotated[
    Path, typer.Option(parser=parse_path, metavar="FOLDER", help="Folder for the plot and the JSON file.")
]
