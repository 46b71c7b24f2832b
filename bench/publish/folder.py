"""A folder of results: one machine and its runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure.records import Machine, RecordError, Run, Section, read, write
from model.extras.files import make_folder

MACHINE, RUN = "machine.json", "run.json"


@dataclass(frozen=True)
class Folder:
    """A machine and its runs, in the order of their files' names."""

    path: Path
    machine: Machine
    runs: list[Run]

    def section(self, study: str) -> Section | None:
        """A study's section in the first run that has it; None if no run does."""
        return next((run.sections[study] for run in self.runs if study in run.sections), None)

    def result(self, study: str) -> Any:
        """The study's `Result` in that section, or None."""
        section = self.section(study)
        return section.result if section else None

    def every(self, study: str) -> list[Any]:
        """A study's `Result` from each run that has it."""
        return [run.sections[study].result for run in self.runs if study in run.sections]

    @property
    def studies(self) -> set[str]:
        """Names of all studies that were measured."""
        return {name for run in self.runs for name in run.sections}

    @property
    def commits(self) -> list[str]:
        """The measured commits, in order."""
        sections = [section for run in self.runs for section in run.sections.values()]
        return list(dict.fromkeys(section.conditions.commit or "unknown" for section in sections))


def read_folder(path: Path) -> Folder:
    """Read a folder of results.

    Raises
    ------
    RecordError
        If a file in it is damaged or missing.
    """
    if not (path / MACHINE).is_file():
        raise RecordError(f"{path} is not a folder of results: it has no {MACHINE}")
    files = sorted(path.glob("run*.json"))
    if not files:
        raise RecordError(f"{path} has no run*.json: nothing was measured there")
    return Folder(path, read(Machine, path / MACHINE), [read(Run, file) for file in files])


def read_all(path: Path) -> list[Folder]:
    """Read all folders of results in a folder, sorted by name."""
    return [read_folder(file.parent) for file in sorted(path.glob(f"*/{MACHINE}"))]


def existing_run(folder: Path) -> Run:
    """Read the run in a folder, or start one. Called before anything is measured, so that an error costs no work.

    Raises
    ------
    RecordError
        If the run is damaged.
    OSError
        If the folder cannot be written.
    """
    make_folder(folder)
    return read(Run, folder / RUN) if (folder / RUN).exists() else Run()


def save(folder: Path, machine: Machine, run: Run) -> None:
    """Write both files, each atomically."""
    write(folder / MACHINE, machine)
    write(folder / RUN, run)
