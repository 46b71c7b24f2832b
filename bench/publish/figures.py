"""Draw every figure that a folder of results has data for. If one fails, that is reported, and the others are drawn."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from bench.publish import claims
from bench.publish.folder import Folder
from bench.publish.style import INTERVALS, RANGES, small_print
from bench.studies import EVERY_RUN, STUDIES, study

WITH_INTERVALS = ("epochs", "kernels", "ladder", "roofline", "head_to_head", "mini_batches", "density", "scaling")
"""Figures that show medians with their intervals or, of several runs, their ranges."""
UNTIMED = ("reproduction",)
"""Figures of accuracies, which do not depend on the machine's load."""


def draw_all(
    folder: Folder, output: Path, say: Callable[[str], None], claimed: Sequence[Folder] = ()
) -> dict[str, Path]:
    """Draw into `output`. A figure that fails stays as it was, and so does each that a Ctrl-C leaves undrawn.

    Parameters
    ----------
    folder
        The results.
    output
        Folder for the figures.
    say
        Is called with a line for each failure.
    claimed
        The machines in the figure of claims; if empty, only that of `folder`.

    Returns
    -------
    dict[str, Path]
        The files drawn, by study.
    """
    drawn: dict[str, Path] = {}

    def attempt(name: str, draw: Callable[[Path], None]) -> None:
        file, new = output / f"{name}.png", output / f".{name}.png"
        try:
            draw(new)
            if new.exists():
                new.replace(file)
                drawn[name] = file
            else:  # the results lack its data
                file.unlink(missing_ok=True)
        except Exception as error:
            say(f"{file.name} was not drawn: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        finally:
            new.unlink(missing_ok=True)

    attempt("claims", partial(claims.draw, claimed or [folder]))
    for name in STUDIES:
        sections = folder.idle_sections(name)
        if sections and hasattr(study(name), "draw"):
            results = folder.idle_results(name)
            shown = results if name in EVERY_RUN else results[0]
            spread = RANGES.format(len(results)) if name in EVERY_RUN and len(results) > 1 else INTERVALS
            medians = spread if name in WITH_INTERVALS else ""
            origin = small_print(sections[0], folder.machine, medians, timed=name not in UNTIMED)
            attempt(name, partial(study(name).draw, shown, origin))
    return drawn
