"""``python -m bench run`` makes the studies, ``python -m bench draw`` draws results again.

What a study found goes into ``results.json``, the file of the benchmarks, under the study's name, with the environment
of that run.
"""

import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from bench import REPEATS, RESULTS
from bench.publish.figures import draw_benchmarks
from bench.publish.style import small_print
from bench.publish.tables import published_ratios
from bench.studies import STUDIES, study
from model.cli.console import tell
from model.cli.signals import Stopped
from model.data import DataError, limited, load_dataset
from model.extras.environment import environment
from model.extras.files import write_json

app = typer.Typer(help="Studies that take more than a benchmark.", add_completion=False, pretty_exceptions_enable=False)
Output = Annotated[Path, typer.Option(help="Folder for the results and plots.")]


@app.command()
def run(
    names: Annotated[list[str] | None, typer.Argument(help=f"{', '.join(STUDIES)} [default: all]")] = None,
    quick: Annotated[bool, typer.Option(help="Fewer images and rounds, only to try it.")] = False,
    dataset: Annotated[str, typer.Option(help="mnist, digits28 or auto.")] = "auto",
    output: Output = Path("bench/output"),
) -> None:
    """Make studies, add what they found to results.json, and draw it."""
    if unknown := set(names or ()).difference(STUDIES):
        raise typer.BadParameter(f"no study is named {', '.join(sorted(unknown))}; there are {', '.join(STUDIES)}")
    chosen = list(names or STUDIES)
    if len(chosen) > 1:  # each in a process of its own, without the threads of another's packages
        options = ["--dataset", dataset, "--output", str(output), *["--quick"] * quick]
        for name in chosen:
            if code := subprocess.run([sys.executable, "-m", "bench", "run", name, *options]).returncode:
                raise typer.Exit(code)
        return
    (name,) = chosen
    output.mkdir(parents=True, exist_ok=True)
    file = output / RESULTS
    images = load_dataset(dataset)
    images = limited(images, 6_000) if quick else images
    tell(f"{name} ...")
    section = {
        "environment": environment(),
        "date": datetime.date.today().isoformat(),
        "dataset": images.name,
        "quick": quick,
        "found": study(name).measure(images, quick),
    }
    content = json.loads(file.read_text()) if file.exists() else {}
    content.setdefault("studies", {})[name] = section
    write_json(file, content)
    draw(file, output, name)


@app.command()
def repeats(
    files: Annotated[list[Path], typer.Argument(help="The results.json of further runs.")],
    output: Output = Path("bench/output"),
) -> None:
    """Keep the ratios of further runs, to see how far the published ones repeat."""
    output.mkdir(parents=True, exist_ok=True)
    studies = [json.loads(file.read_text())["studies"] for file in files]
    write_json(output / REPEATS, [published_ratios({name: run[name]["found"] for name in run}) for run in studies])


@app.command()
def draw(
    file: Annotated[Path, typer.Argument(help="A results.json, from this machine or another.")],
    output: Output = Path("bench/output"),
    only: Annotated[str | None, typer.Option(help="Only this study.")] = None,
) -> None:
    """Draw every figure that the results have data for."""
    output.mkdir(parents=True, exist_ok=True)
    content = json.loads(file.read_text())
    drawn = draw_benchmarks(file, output) if "benchmarks" in content and not only else []
    for name, section in content.get("studies", {}).items():
        if name == (only or name) and hasattr(study(name), "draw"):
            origin = small_print(section["environment"], section["date"], section["dataset"], section["quick"])
            drawn.append(output / f"{name}.png")
            study(name).draw(section["found"], origin, drawn[-1])
    for figure in drawn:
        tell(str(figure))


if __name__ == "__main__":
    try:
        app()
    except Stopped as stopped:
        sys.exit(128 + stopped.signal)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except json.JSONDecodeError as error:
        print(f"error: this is no results file, or a damaged one ({error})", file=sys.stderr)
        sys.exit(2)
