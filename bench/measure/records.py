"""Measurements as typed records. Each has a ``kind``, so that a file says what it is; pydantic reads and writes them.

A study returns a record, its class `Found`, whose ``kind`` is the study's name. Timings in it are `Rounds` or
`Comparison`, which keep every round; medians, intervals and ratios are computed where they are shown. A `Run` is one
file: a `Section` for each study, with the conditions under which it was measured. The folder of a machine holds
``machine.json`` and a file for each run.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json
from scipy.stats import bootstrap

from model.extras.files import write_whole

FEWEST_ROUNDS = 6
"""Of fewer rounds, even their whole range misses the median too often for a 95 % interval: 2 · 0.5⁵ is 6 %."""

Interval = tuple[float, float] | None


class RecordError(Exception):
    """A file is not a record of the expected kind; the message names the file and says what to do."""


def rounded(values: NDArray[np.floating] | list[float]) -> list[float]:
    """Seconds as they are stored: six digits, more than any clock is worth."""
    return [float(f"{value:.6g}") for value in values]


# Timings -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounds:
    """Seconds of one thing, round by round."""

    seconds: list[float]
    kind: Literal["rounds"] = "rounds"

    @classmethod
    def of(cls, seconds: NDArray[np.floating]) -> "Rounds":
        """From (rounds,) seconds."""
        return cls(rounded(seconds))

    @cached_property
    def median(self) -> float:
        """Seconds."""
        return float(np.median(self.seconds))

    @cached_property
    def interval(self) -> Interval:
        """95 % bootstrap confidence interval of the median; None if there are too few rounds."""
        return _bootstrap(np.median, self.seconds)

    @property
    def low(self) -> float:
        """The interval's lower end; the median itself where there is no interval, so that it can be drawn."""
        return self.interval[0] if self.interval else self.median

    @property
    def high(self) -> float:
        """Its upper end, likewise."""
        return self.interval[1] if self.interval else self.median


@dataclass(frozen=True)
class Ratio:
    """The time of a competitor relative to its base: a ratio of medians."""

    competitor: str
    base: str
    ratio: float
    base_seconds: float
    interval: Interval
    """95 % bootstrap confidence interval, with whole rounds resampled; None if there are too few."""

    @property
    def verdict(self) -> str:
        """Whether the competitor is "faster" or "slower", or "equal" as far as this run can tell."""
        low, high = self.interval or (self.ratio, self.ratio)
        return "faster" if high < 1 else "slower" if low > 1 else "equal"


@dataclass(frozen=True)
class Comparison:
    """Seconds of competitors interleaved round by round: what every ratio is computed from."""

    what: str
    seconds: dict[str, list[float]]
    """By competitor, (rounds,); entries of one round belong together."""
    kind: Literal["comparison"] = "comparison"

    @classmethod
    def of(cls, what: str, seconds: Mapping[str, NDArray[np.floating]]) -> "Comparison":
        """From what `bench.measure.interleave.interleave` returned."""
        return cls(what, {name: rounded(times) for name, times in seconds.items()})

    def __contains__(self, name: object) -> bool:
        return name in self.seconds

    @cached_property
    def rounds(self) -> dict[str, Rounds]:
        """By competitor."""
        return {name: Rounds(seconds) for name, seconds in self.seconds.items()}

    def median(self, name: str) -> float:
        """Seconds of a competitor."""
        return self.rounds[name].median

    def ratio(self, competitor: str, base: str) -> Ratio:
        """The time of `competitor` relative to `base`."""

        def of_medians(ours: NDArray, theirs: NDArray, axis: int = -1) -> NDArray:
            return np.median(ours, axis=axis) / np.median(theirs, axis=axis)

        interval = _bootstrap(of_medians, self.seconds[competitor], self.seconds[base])
        base_seconds = self.median(base)
        return Ratio(competitor, base, self.median(competitor) / base_seconds, base_seconds, interval)


def _bootstrap(statistic: Any, *samples: list[float]) -> Interval:
    if len(samples[0]) < FEWEST_ROUNDS:
        return None
    if all(len(set(sample)) == 1 for sample in samples):  # equal rounds have no distribution to resample
        value = float(statistic(*samples))
        return value, value
    interval = bootstrap(
        samples, statistic, paired=len(samples) > 1, n_resamples=2000, method="percentile", rng=0
    ).confidence_interval
    return float(interval.low), float(interval.high)


# Runs and machines -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conditions:
    """The conditions under which a section was measured."""

    date: str
    """ISO 8601, with seconds and time zone."""
    dataset: str
    quick: bool
    commit: str | None
    """Of the project's files, with "-dirty" if one was changed since; None where git cannot tell."""
    load: float | None
    """Load average of the minute before it began: other processes that wanted a core."""
    steal: float | None
    """Share of the CPU time that the hypervisor gave to other machines meanwhile."""
    seconds: float | None
    """Total duration."""
    busy: str | None
    """Why the timings are in doubt; None where nothing is known to disturb them."""
    environment: dict[str, Any]
    """What `model.extras.environment` tells: versions, and variables that tune them."""
    note: str | None = None


@dataclass(frozen=True)
class Section:
    """What a study found, and how."""

    conditions: Conditions
    found: Any
    """The study's record; its ``kind`` is the study's name."""


@dataclass(frozen=True)
class Run:
    """One file: sections by the name of their study."""

    sections: dict[str, Section] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    """Why a study has no section."""
    kind: Literal["run"] = "run"


@dataclass(frozen=True)
class Cache:
    """A data cache of the first core, as the system's files describe it."""

    level: int
    bytes: int
    shared_by: int
    """Logical CPUs."""


@dataclass(frozen=True)
class Machine:
    """What does not change from run to run."""

    name: str
    """The microarchitecture, as people call it: "Zen 3"."""
    cpu: str
    """The model's name, as the CPU tells it."""
    llvm_name: str
    """What LLVM generates code for."""
    family: int | None
    model: int | None
    isa: list[str]
    """The instruction sets that matter here."""
    cores: int
    """Logical CPUs that this process may use."""
    threads_per_core: int | None
    """Above 1 with simultaneous multithreading."""
    caches: list[Cache]
    hypervisor: str | None
    system: str
    blas: str | None
    """NumPy's, with the kernel that it chose."""
    mkl: str | None
    """What PyTorch's MKL takes this CPU for; None without PyTorch or its MKL."""
    peak_gflop_per_second: float | None = None
    """Multiply-adds on one thread, as measured by the study roofline."""
    bandwidth_gb_per_second: dict[str, float] = field(default_factory=dict)
    """By level of memory, as measured there."""
    note: str | None = None
    kind: Literal["machine"] = "machine"


# Files -------------------------------------------------------------------------------------------------------------

Record = TypeVar("Record")


def read(kind: type[Record], file: Path) -> Record:
    """The record that `file` holds.

    Raises
    ------
    RecordError
        If it is damaged, or a record of another kind.
    OSError
        If it cannot be read.
    """
    try:
        content = from_json(file.read_bytes())
        if not isinstance(content, dict) or content.get("kind") != kind.__name__.lower():
            raise KeyError("its kind is another")
        record = TypeAdapter(kind).validate_python(content)
        if isinstance(record, Run):
            from bench.studies import result_class  # the studies import this module

            for name, section in record.sections.items():
                result = TypeAdapter[Any](result_class(name)).validate_python(section.found)
                record.sections[name] = dataclasses.replace(section, found=result)
    except (ValueError, KeyError) as error:
        why = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            why = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
        raise RecordError(
            f"{file} holds no {kind.__name__.lower()}, or a damaged one ({why}); move it away or name another folder"
        ) from error
    return record


def write(file: Path, record: Any) -> None:
    """Write a record atomically."""
    text = TypeAdapter[Any](type(record)).dump_json(record, indent=1).decode()
    lists = re.compile(r"\[[^][{}\"]*\]")  # numbers stand side by side
    write_whole(file, lists.sub(lambda match: re.sub(r"\s+", " ", match[0]), text).encode() + b"\n")
