"""Measurements as typed records. Each has a ``kind``, which names its type in the file. pydantic reads and writes them.

A study returns an instance of its class `Result`, whose ``kind`` is the study's name. Timings in it are `Rounds` or
`Comparison`, which keep every round; medians, intervals and ratios are computed for display only. A `Run` is one file:
a `Section` for each study, with the conditions under which it was measured. The folder of a machine has
``machine.json`` and a file for each run.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import from_json
from scipy.stats import bootstrap

from model.environment import Environment
from model.files import write_atomically

FEWEST_ROUNDS = 6
"""Fewer rounds get no 95 % interval: even the full range of five misses the median with probability 2 · 0.5⁵, 6 %."""

Interval = tuple[float, float] | None
Seconds = Annotated[list[Annotated[float, Field(gt=0, allow_inf_nan=False)]], Field(min_length=1)]
"""Round by round. Files are checked for what no clock can have measured."""


class RecordError(Exception):
    """A file is not a record of the expected kind; the message names the file and says what to do."""


def rounded(values: NDArray[np.floating] | list[float]) -> list[float]:
    """Seconds rounded for storage, to six significant digits: more than the clock resolves."""
    return [float(f"{value:.6g}") for value in values]


# Timings -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounds:
    """Seconds of one competitor, round by round."""

    seconds: Seconds
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
        """Lower end of the interval; the median if there is no interval, so that it can be drawn."""
        return self.interval[0] if self.interval else self.median

    @property
    def high(self) -> float:
        """Upper end, likewise."""
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
        """Either "faster" or "slower" than the base, or "equal" if the interval includes 1: this run cannot tell."""
        low, high = self.interval or (self.ratio, self.ratio)
        return "faster" if high < 1 else "slower" if low > 1 else "equal"


@dataclass(frozen=True)
class Comparison:
    """Seconds of competitors interleaved round by round: what every ratio is computed from."""

    what: str
    seconds: dict[str, Seconds]
    """By competitor, (rounds,); entry i of each is from round i."""
    kind: Literal["comparison"] = "comparison"

    @classmethod
    def of(cls, what: str, seconds: Mapping[str, NDArray[np.floating]]) -> "Comparison":
        """From the seconds that `bench.measure.interleave.interleave` returned."""
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
    """Of the project, with "-dirty" if a file has uncommitted changes; None if git cannot tell."""
    load: float | None
    """Load average of the minute before the start: other processes that wanted a core."""
    steal: float | None
    """Steal time: the share of the CPU time that the hypervisor gave to other guests."""
    seconds: float | None
    """Total duration."""
    busy: str | None
    """What disturbed the timings; None if nothing is known to have disturbed them."""
    environment: Environment
    note: str | None = None


@dataclass(frozen=True)
class Section:
    """The result of a study, and the conditions of its measurement."""

    conditions: Conditions
    result: Any
    """The study's `Result`."""


@dataclass(frozen=True)
class Run:
    """One file: sections by the name of their study."""

    sections: dict[str, Section] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    """Why a study has no section."""
    kind: Literal["run"] = "run"


@dataclass(frozen=True)
class Cache:
    """A data cache of the first core, from ``/sys``."""

    level: int
    bytes: int
    shared_by: int
    """Logical CPUs."""


@dataclass(frozen=True)
class Machine:
    """A machine: everything that stays the same from run to run."""

    name: str
    """The common name of the microarchitecture: "Zen 3"."""
    cpu: str
    """The model name that the CPU reports."""
    llvm_name: str
    """The CPU that LLVM generates code for."""
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
    blas: str | None
    """NumPy's, with the CPU kernel that it selected."""
    mkl: str | None
    """Version and code path that PyTorch's MKL reports; None without PyTorch or its MKL."""
    kind: Literal["machine"] = "machine"


# Files -------------------------------------------------------------------------------------------------------------

Record = TypeVar("Record")


def read(kind: type[Record], file: Path) -> Record:
    """Read a record of this kind from a file.

    Raises
    ------
    RecordError
        If the file is damaged, or has a record of another kind.
    OSError
        If it cannot be read.
    """
    try:
        content = from_json(file.read_bytes())
        if not isinstance(content, dict) or content.get("kind") != kind.__name__.lower():
            raise KeyError("another kind")
        record = TypeAdapter(kind).validate_python(content)
        if isinstance(record, Run):
            from bench.studies import result_class  # the studies import this module

            for name, section in record.sections.items():
                result = TypeAdapter[Any](result_class(name)).validate_python(section.result)
                record.sections[name] = dataclasses.replace(section, result=result)
    except (ValueError, KeyError) as error:
        why = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            why = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
        raise RecordError(
            f"{file} is not a valid {kind.__name__.lower()} ({why}); move it away or name another folder"
        ) from error
    return record


def write(file: Path, record: Any) -> None:
    """Write a record atomically."""
    text = TypeAdapter[Any](type(record)).dump_json(record, indent=1).decode()
    lists = re.compile(r"\[[^][{}\"]*\]")  # a list of numbers goes on one line
    write_atomically(file, lists.sub(lambda match: re.sub(r"\s+", " ", match[0]), text).encode() + b"\n")
