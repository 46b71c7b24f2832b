"""Runs of the command line, and a comparison of their results."""

import os
import subprocess
import sys

from model.extras.checkpoint import Checkpoint


def run_model(*arguments, **options):
    command = [sys.executable, "-m", "model", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "100"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, **options)


def assert_same(ours: Checkpoint, theirs: Checkpoint) -> None:
    """Check for equal bits in everything except measured times."""
    assert [one.tobytes() for one in ours.mlp.parameters] == [other.tobytes() for other in theirs.mlp.parameters]
    first, second = ([epoch._replace(seconds=0) for epoch in run.state.history.epochs] for run in (ours, theirs))
    assert first == second
    assert (ours.state.rng, ours.state.steps, ours.config) == (theirs.state.rng, theirs.state.steps, theirs.config)
