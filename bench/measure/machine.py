"""The machine and its load, mostly from ``/sys`` and ``/proc``, which tell more than CPUID."""

import datetime
import functools
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from bench.measure.records import Cache, Conditions, Machine
from model.environment import environment, git, numpy_blas
from model.threads import available_cores

CPU = Path("/sys/devices/system/cpu")
STAT = Path("/proc/stat")

# LLVM's names of microarchitectures, which it identifies by family and model, and their common names.
NAMES = {
    "znver1": "Zen 1",
    "znver2": "Zen 2",
    "znver3": "Zen 3",
    "znver4": "Zen 4",
    "znver5": "Zen 5",
    "haswell": "Haswell",
    "broadwell": "Broadwell",
    "skylake": "Skylake",
    "skylake-avx512": "Skylake-X",
    "cascadelake": "Cascade Lake",
    "icelake-server": "Ice Lake",
    "sapphirerapids": "Sapphire Rapids",
    "emeraldrapids": "Emerald Rapids",
    "graniterapids": "Granite Rapids",
    "alderlake": "Alder Lake",
    "raptorlake": "Raptor Lake",
    "neoverse-n1": "Neoverse N1",
    "neoverse-v1": "Neoverse V1",
    "neoverse-v2": "Neoverse V2",
    "apple-m1": "Apple M1",
    "apple-m2": "Apple M2",
    "apple-m3": "Apple M3",
    "apple-m4": "Apple M4",
}

ISA = ("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16")
ARM_ISA = ("asimd", "asimdhp", "sve", "sve2", "bf16", "i8mm")

# Above these, timings are flagged: cores kept busy by other processes, and stolen time as a share of all CPU time.
OTHERS, STOLEN = 0.15, 0.02

Value = TypeVar("Value")


@functools.cache  # it takes seconds
def machine() -> Machine:
    """The machine that this runs on; whatever the system does not report is None."""
    import cpuinfo
    from llvmlite import binding

    from bench.peers.pytorch import mkl_code_path

    cpu, llvm_name = cpuinfo.get_cpu_info(), binding.get_host_cpu_name()
    flags = set(cpu.get("flags", ()))
    software = environment()
    return Machine(
        name=NAMES.get(llvm_name, llvm_name),
        cpu=software.cpu,
        llvm_name=llvm_name,
        family=cpu.get("family"),
        model=cpu.get("model"),
        isa=[name for name in (*ISA, *ARM_ISA) if name in flags],
        cores=available_cores(),
        threads_per_core=len(cpus) if (cpus := _cpus("cpu0/topology/thread_siblings_list")) else None,
        caches=caches(),
        hypervisor=_hypervisor(flags),
        blas=", ".join(software.blas) or None,
        mkl=mkl_code_path(),
    )


def caches(core: Path = CPU / "cpu0") -> list[Cache]:
    """Data caches of a core, nearest first."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    levels = []
    for index in sorted(core.glob("cache/index*")):
        size = re.fullmatch(r"(\d+)([KMG])", _text(index / "size"))
        if size and _text(index / "type") in ("Data", "Unified"):
            shared = len(_parse_cpus(_text(index / "shared_cpu_list")))
            levels.append(Cache(int(_text(index / "level")), int(size[1]) * units[size[2]], shared))
    return levels


def blas_threads() -> list[int]:
    """Numbers of threads on which BLAS can be timed: one and all, but only one with Accelerate."""
    is_fixed = any(library["internal_api"] == "Accelerate" for library in numpy_blas())
    return [1] if is_fixed else sorted({1, available_cores()})


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _cpus(name: str) -> list[int]:
    return _parse_cpus(_text(CPU / name))


def _parse_cpus(text: str) -> list[int]:
    """The numbers in a list like 0-3,8."""
    ranges = [part.split("-") for part in text.split(",") if part]
    return [cpu for ends in ranges for cpu in range(int(ends[0]), int(ends[-1]) + 1)]


def _hypervisor(flags: set[str]) -> str | None:
    """Name of the hypervisor, "unnamed" if it gives none; None on bare metal."""
    name = _text(Path("/sys/hypervisor/type")) or _text(Path("/sys/class/dmi/id/sys_vendor"))
    return (name or "unnamed") if "hypervisor" in flags else None


# What else runs ----------------------------------------------------------------------------------------------------


class Times(NamedTuple):
    """Clock readings, in seconds from an arbitrary start."""

    clock: float
    """Wall time."""
    busy: float
    """CPU time of all processes, summed over all CPUs."""
    stolen: float
    """Steal time, summed over all CPUs: the hypervisor ran other guests."""
    ours: float
    """CPU time of this process and its finished children."""


def times() -> Times | None:
    """The current readings; None where the system does not report them."""
    fields = _text(STAT).partition("\n")[0].split()
    if not fields:
        return None
    ticks = [int(value) / os.sysconf("SC_CLK_TCK") for value in fields[1:9]]
    user, nice, system, _idle, _wait, irq, soft, steal = ticks
    return Times(time.monotonic(), user + nice + system + irq + soft, steal, sum(os.times()[:4]))


def disturbance(before: Times | None, after: Times | None) -> tuple[float | None, str | None]:
    """The share of CPU time stolen between two readings, and what disturbed the timings; None if nothing did."""
    if not before or not after:
        return None, None
    passed = after.clock - before.clock
    stolen = (after.stolen - before.stolen) / passed / (os.cpu_count() or 1)
    others = max(0.0, (after.busy - before.busy) - (after.ours - before.ours)) / passed
    words = []
    if others > OTHERS:
        words.append(f"other processes kept {others:.1f} cores busy")
    if stolen > STOLEN:
        words.append(f"the hypervisor gave {stolen:.0%} of the CPU time to other guests")
    return stolen, " and ".join(words) or None


def busy_now() -> str | None:
    """What else uses the machine while this process sleeps for a second; None if nothing does."""
    before = times()
    time.sleep(1)
    return disturbance(before, times())[1]


def under_conditions(measure: Callable[[], Value], dataset: str, quick: bool) -> tuple[Value, Conditions]:
    """Call `measure`; returns its result and the conditions under which it ran."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    software = environment()
    before, start = times(), time.monotonic()
    value = measure()
    steal, busy = disturbance(before, times())
    seconds = time.monotonic() - start
    return value, Conditions(date, dataset, quick, software.commit, load, steal, seconds, busy, software)


def cpu_words(machine: Machine) -> str:
    """A one-line description of the machine."""
    sizes = ", ".join(f"{_size(cache.bytes)} L{cache.level}" for cache in machine.caches)
    return f"{machine.name} ({machine.cpu}), {machine.cores} {cpu_unit(machine)}; {sizes or 'caches unknown'}"


def cpu_unit(machine: Machine) -> str:
    """What a logical CPU is: a core only if it is known to run one thread."""
    return "threads" if (machine.threads_per_core or 2) > 1 else "cores"


def _size(size: int) -> str:
    return f"{size // 2**20} MB" if size >= 2**20 else f"{size // 2**10} KB"


def slug(machine: Machine) -> str:
    """The machine's name as a folder name."""
    return re.sub(r"[^a-z0-9]+", "-", f"{machine.name}-{machine.cores}".lower()).strip("-") or platform.machine()


def kernels_changed(*commits: str) -> bool | None:
    """Whether the code in ``kernels/`` has changed since any of the commits; None if git cannot tell."""
    changes = [_kernels_changed(commit) for commit in commits]
    return True if any(changes) else None if None in changes else False


def _kernels_changed(commit: str) -> bool | None:
    try:
        git("diff", "--quiet", commit.removesuffix("-dirty"), "--", ":(top,glob)kernels/**/*.py")
    except subprocess.CalledProcessError as error:
        return True if error.returncode == 1 else None
    except OSError:
        return None
    return False


def has_history() -> bool:
    """Whether this is a clone with all commits, not a shallow one or a copy without git."""
    try:
        return git("rev-parse", "--is-shallow-repository") == "false"
    except (OSError, subprocess.CalledProcessError):
        return False
