"""Hostile input by the million: see `tests.support.fuzz`.

python -m tests.soak.fuzz --inputs 1000000
"""

import os
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.support.fuzz import READERS, SCRATCH, SECONDS, try_inputs

BATCH = 250


def main(
    inputs: Annotated[int, typer.Option(help="Number of inputs.")] = 1_000_000,
    seed: Annotated[int, typer.Option(help="Seed for the inputs.")] = 0,
    repeat: Annotated[str, typer.Option(help="Run only this input, e.g. picture:17.")] = "",
) -> None:
    """Feed mutants of valid files to all code that reads untrusted files."""
    print(f"seed {seed}")
    if repeat:
        name, _, number = repeat.partition(":")
        batches = [(name, range(int(number), int(number) + 1))]
    else:
        batches = [
            (name, range(start, min(start + BATCH, inputs * reader.share // 100)))
            for name, reader in READERS.items()
            for start in range(0, inputs * reader.share // 100, BATCH)
        ]
    Random(seed).shuffle(batches)
    outcomes, findings = Counter[tuple[str, str]](), []
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        os.environ["TMPDIR"] = scratch
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(try_inputs, name, seed, numbers) for name, numbers in batches]
            try:
                for future in track(as_completed(futures), "trying", len(futures)):
                    counted, found = future.result()
                    outcomes += counted
                    findings += found
                    print(*found, sep="\n", end="", file=sys.stderr)
            except BrokenProcessPool:
                running = [file.read_text() for file in Path(scratch).glob("*/running")]
                sys.exit(
                    f"a process died, or was ended after {SECONDS} seconds, at {' or '.join(running)}, seed {seed}"
                )
    table = Table("reader", "accepted", "refused", "findings")
    for name in READERS:
        table.add_row(name, *(f"{outcomes[name, kind]:,}" for kind in ("accepted", "refused", "finding")))
    Console().print(table)
    sys.exit(bool(findings))


if __name__ == "__main__":
    typer.run(main)
