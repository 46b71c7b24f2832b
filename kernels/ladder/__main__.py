"""``python -m kernels.ladder``: time the steps and show their inner loops."""

import contextlib
import io
import sys
from typing import Annotated, Any, NoReturn

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

console = Console()
errors = Console(stderr=True)


def fail(message: str) -> NoReturn:
    """Print an error on one line of stderr and exit with code 2."""
    errors.print(f"error: {message}", soft_wrap=True, markup=False, highlight=False)
    try:
        print(end="", flush=True)
    except OSError:  # on exit, Python would try to flush stdout again, report that too, and change the code to 120
        with contextlib.suppress(OSError):
            sys.stdout.close()
    sys.exit(2)


try:
    from kernels.ladder.assembly import hottest_block, machine_code
    from kernels.ladder.steps import CORES, STEPS
    from kernels.ladder.timing import measure
except ValueError as error:  # Numba's compiler is disabled
    fail(str(error))

app = typer.Typer(
    rich_markup_mode=None,  # markup would swallow [default: ...]
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def run(
    step: Annotated[str | None, typer.Argument(help=f"One of {', '.join(STEPS)}. [default: all of them]")] = None,
    size: Annotated[int, typer.Option(min=1, max=10**6, help="Rows and columns of the square matrices.")] = 1024,
    asm: Annotated[bool, typer.Option("--asm", help="Also show the assembly of the inner loop.")] = False,
) -> None:
    """Climb the ladder: one matrix product, from three Python loops to BLAS speed.

    Each step is a short function in kernels/ladder/steps.py with one new idea, explained in the README beside it. The
    table shows billions of floating-point operations per second (GFLOP/s), also as a percentage of NumPy's BLAS on the
    same number of threads. Slow steps compute only a few rows of the result.
    """
    if step is not None and step not in STEPS:
        raise typer.BadParameter(f"there is no step {step!r}: choose one of {', '.join(STEPS)}")
    names = list(STEPS) if step is None else [step]
    title = f"{size} × {size} × {size}, float32; one thread, {CORES} for the step called threads"
    table = Table("step", "rows", "GFLOP/s", "% of BLAS", box=SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, (rows, speed, ratio) in measure(names, size).items():
        table.add_row(name, f"{rows:,}", f"{speed:.3g}", f"{100 * ratio:.3g}")
    console.width = max(console.width, console.measure(table, options=console.options.update(width=10_000)).maximum)
    console.print(title)
    console.print(table)
    for name in names if asm else ():
        console.print(f"{name}: {(STEPS[name].__doc__ or '').splitlines()[0]}\n", soft_wrap=True, markup=False)
        code = ["        interpreted: no machine code"] if name == "loops" else hottest_block(machine_code(name))
        console.print("\n".join(code) + "\n", soft_wrap=True, markup=False, highlight=False)


def main(app: typer.Typer) -> None:
    """Run a command line; every expected error is one line on stderr and exit code 2."""
    for stream in sys.stdout, sys.stderr:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # not every encoding has a ×
    usage_error: Any = typer.BadParameter.__base__  # base class of all usage errors; its module was renamed
    try:
        sys.exit(app(standalone_mode=False))
    except usage_error as error:
        fail(error.format_message())
    except (ValueError, OSError) as error:
        fail(str(error))
    except MemoryError as error:
        fail(f"too large for this machine ({str(error) or 'out of memory'}): use smaller values")
    except (KeyboardInterrupt, typer.Abort):
        errors.print("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main(app)
