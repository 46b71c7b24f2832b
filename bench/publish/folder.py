"""A folder of results: one machine and its runs."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.measure.machine import machine
from bench.measure.records import Machine, RecordError, Run, Section, read, write
from model.files import make_folder

MACHINE, RUN = "machine.json", "run.json"


@dataclass(frozen=True)
class Folder:
    """A machine and its runs, in the order of their files' names."""

    path: Path
    machine: Machine
    runs: list[Run]
    label: str = ""
    """The machine's name, with the folder's if several have that name."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.label or self.machine.name)

    def section(self, study: str) -> Section | None:
        """A study's section in the first run that has it, if possible on an idle machine; None if no run does."""
        return next(iter(self.idle_sections(study)), None)

    def idle_sections(self, study: str) -> list[Section]:
        """A study's section from each run on an idle machine; from every run if none was idle."""
        sections = self.sections(study)
        return [section for section in sections if not section.conditions.busy] or sections

    def idle_results(self, study: str) -> list[Any]:
        """The study's `Result` in each of those sections."""
        return [section.result for section in self.idle_sections(study)]

    def sections(self, study: str) -> list[Section]:
        """A study's section from each run that has it."""
        return [run.sections[study] for run in self.runs if study in run.sections]

    def result(self, study: str) -> Any:
        """The study's `Result` in that section, or None."""
        section = self.section(study)
        return section.result if section else None

    def every(self, study: str) -> list[Any]:
        """A study's `Result` from each run that has it."""
        return [section.result for section in self.sections(study)]

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
    files = sorted(path.glob("run*.json"), key=numbered)
    if not files:
        raise RecordError(f"{path} has no run*.json: nothing was measured there")
    return Folder(path, read(Machine, path / MACHINE), [read(Run, file) for file in files])


def numbered(file: Path) -> tuple[str, int]:
    """A run's file name without the number at its end, and that number; 0 if there is none."""
    stem, _, number = file.stem.rpartition("-")
    return (stem, int(number)) if number.isdecimal() else (file.stem, 0)


def read_all(path: Path) -> list[Folder]:
    """Read all folders of results in a folder, sorted by name."""
    folders = [read_folder(file.parent) for file in sorted(path.glob(f"*/{MACHINE}"))]
    names = Counter(folder.machine.name for folder in folders)
    shared = {name for name, count in names.items() if count > 1}
    return [
        replace(folder, label=f"{folder.label} ({folder.path.name})") if folder.machine.name in shared else folder
        for folder in folders
    ]


def existing_run(folder: Path) -> Run:
    """Read this machine's run in a folder, or start one. Called before anything is measured: an error costs no work.

    Raises
    ------
    RecordError
        If the run is damaged, or the folder's runs are from another machine.
    OSError
        If the folder cannot be written.
    """
    make_folder(folder)
    if (folder / MACHINE).exists():
        check_machine(folder, machine())
    return read(Run, folder / RUN) if (folder / RUN).exists() else Run()


def check_machine(folder: Path, here: Machine) -> None:
    """Check that a folder's runs are of this machine, as far as both records tell; no hypervisor means bare metal.

    Raises
    ------
    RecordError
        If the folder's runs are from another machine.
    """
    there = read(Machine, folder / MACHINE)
    for name in ("cpu", "llvm_name", "family", "model", "cores", "caches", "hypervisor"):
        old, new = getattr(there, name), getattr(here, name)
        if old != new and (name == "hypervisor" or (old and new)):
            raise RecordError(
                f"{folder} has runs of another machine, whose {name} is {old}, not {new}: choose a folder with --output"
            )


def save(folder: Path, machine: Machine, run: Run) -> None:
    """Write both files, each atomically."""
    write(folder / MACHINE, machine)
    write(folder / RUN, run)
