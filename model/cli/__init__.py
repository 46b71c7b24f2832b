"""The command line: ``python -m model train``, ``reproduce`` and ``predict``, one file for each."""

import os
import sys
from typing import Any

import typer

from model.cli.console import fail, print_any_name, print_status
from model.cli.predict import predict_command
from model.cli.reproduce import reproduce_command
from model.cli.train import train_command
from model.data import DataError
from model.extras.checkpoint import CheckpointError
from model.signals import Stopped, stoppable
from model.training import TrainingError

app = typer.Typer(
    help="Train a small neural network on MNIST, with kernels written in different ways.",
    rich_markup_mode=None,  # markup would swallow [default: ...], and shows nothing in narrow terminals
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train")(train_command)
app.command("reproduce")(reproduce_command)
app.command("predict")(predict_command)


def main() -> None:
    """Run the command line; every expected error is one line on stderr and exit code 2."""
    usage_error: Any = typer.BadParameter.__base__  # base class of all usage errors; its module was renamed
    print_any_name()
    with stoppable():
        try:
            sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
        except usage_error as error:
            fail(error.format_message())
        except (CheckpointError, DataError, TrainingError, ValueError, OSError) as error:
            fail(str(error))
        except (MemoryError, OverflowError) as error:
            fail(f"too large for this machine ({str(error) or 'out of memory'}): use smaller values")
        except Stopped as stopped:
            print_status(f"interrupted{stopped.note}")
            os._exit(128 + stopped.signal)  # do not wait for threads to finish their shards, minutes in pure Python
