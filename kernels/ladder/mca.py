"""``python -m kernels.ladder.mca CPU ...``: how fast the inner loops run on other CPUs, as llvm-mca predicts.

LLVM compiles the inner loops of the products for a CPU: the dense one, its variant for few rows, and the sparse one.
Then llvm-mca (LLVM's machine code analyzer) simulates them on its model of the core, as if all data were in the L1
cache. The percentages compare the multiply-adds per cycle with those of a loop that does nothing else.
"""

import multiprocessing
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Annotated, Any, NamedTuple
from unittest import mock

import llvmlite.binding as llvm
import numpy as np
import typer
from numba.core.registry import cpu_target
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

TRIPLES = ("x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu")
ITERATIONS = 1000
MULTIPLY_ADD = re.compile(r"\s(vf\w*madd\w*|fmla)\s")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Loop(NamedTuple):
    """The inner loop of a product, compiled for a CPU."""

    product: str
    instructions: list[str]
    """Of one iteration, in assembly."""

    @property
    def multiply_adds(self) -> int:
        """Vector multiply-adds in one iteration."""
        return sum(bool(MULTIPLY_ADD.search(instruction)) for instruction in self.instructions)


def loops(triple: str, cpu: str) -> list[Loop]:
    """Compile the inner loops for a CPU. Must run in a process that has not imported the kernels yet.

    The kernels choose their tiles by Numba's target, so it must be set to the CPU before they are imported. Numba
    itself can only compile for this machine: the code for the other one is made from LLVM IR that is not optimized yet.
    """
    os.environ["NUMBA_OPT"] = "0"
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3)
    features = {64: "+avx,+avx512f", 32: "+avx", 16: ""}[_register_bytes(machine)]
    codegen = type(cpu_target.target_context.codegen())
    with mock.patch.object(codegen, "magic_tuple", return_value=(triple, cpu, features)):
        from kernels.ladder.assembly import few_rows_kernel, hottest_block, micro_kernel
        from kernels.sparse_backend import product

    compiled = []
    for name, function in ("dense", micro_kernel), ("few rows", few_rows_kernel), ("sparse", product):
        ir = re.sub(r"(?m)^target .*$", "", function.ir(np.dtype(np.float32)))
        module = llvm.parse_assembly(f'target triple = "{triple}"\n{ir}')
        module.data_layout = str(machine.target_data)
        builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
        builder.getModulePassManager().run(module, builder)
        compiled.append(Loop(name, hottest_block(machine.emit_assembly(module))))
    return compiled


def loops_of(targets: Sequence[tuple[str, str]]) -> list[list[Loop]]:
    """The inner loops for each triple and CPU, compiled in a process for each.

    Raises
    ------
    ValueError
        If LLVM aborts its process, as it does for 32-bit CPUs.
    """

    def in_own_process(target: tuple[str, str]) -> list[Loop]:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                return pool.submit(loops, *target).result()
            except BrokenProcessPool as error:
                raise ValueError(f"LLVM cannot compile for {target[1]}") from error

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(in_own_process, targets))


def _register_bytes(machine: Any) -> int:
    """Width of the registers that LLVM adds 16 floats in."""
    floats = "<16 x float>"
    add = f"define {floats} @add({floats} %a, {floats} %b) {{ %c = fadd {floats} %a, %b ret {floats} %c }}"
    assembly = machine.emit_assembly(llvm.parse_assembly(add))
    return 64 if "zmm" in assembly else 32 if "ymm" in assembly else 16


def multiply_adds_only(loop: Loop) -> Loop:
    """A loop of independent multiply-adds on vectors of the same width: enough of them to hide their latency."""
    code = "\n".join(loop.instructions)
    kind = re.search(r"zmm|ymm|xmm|\.4s", code)
    assert kind
    count = 24 if kind[0] in ("zmm", ".4s") else 12
    if kind[0] == ".4s":
        instructions = [f"\tfmla v{r}.4s, v30.4s, v31.s[0]" for r in range(count)]
    else:
        instructions = [f"\tvfmadd231ps %{kind[0]}{count}, %{kind[0]}{count + 1}, %{kind[0]}{r}" for r in range(count)]
    return Loop("peak", instructions)


def rate(loop: Loop, analyzer: str, triple: str, cpu: str) -> float:
    """Multiply-adds per cycle, by llvm-mca."""
    command = [analyzer, f"-mtriple={triple}", f"-mcpu={cpu}", f"-iterations={ITERATIONS}", "-resource-pressure=false"]
    report = subprocess.run(command, input="\n".join(loop.instructions), capture_output=True, text=True, check=True)
    cycles = re.search(r"Total Cycles: +(\d+)", report.stdout)
    assert cycles, report.stdout
    return loop.multiply_adds * ITERATIONS / int(cycles[1])


def newest_analyzer() -> str | None:
    """The command of the newest llvm-mca on the path: old ones lack models of newer cores."""
    names = [f"llvm-mca-{version}" for version in range(40, 13, -1)]
    return next(filter(shutil.which, [*names, "llvm-mca"]), None)


def triple_of(analyzer: str, cpu: str) -> str:
    """The target that has a CPU of this name."""
    for triple in TRIPLES if cpu not in ("", "help") else ():  # LLVM takes these two as no name, and a request for help
        command = [analyzer, f"-mtriple={triple}", f"-mcpu={cpu}"]
        report = subprocess.run(command, input="", capture_output=True, text=True).stderr
        if "not a recognized processor" in report:
            continue
        if "scheduling information" in report:
            raise typer.BadParameter(f"{analyzer} has no model of {cpu}'s pipeline: name another CPU")
        return triple
    raise typer.BadParameter(
        f"LLVM knows no CPU called {cpu!r}: {analyzer} -mtriple=aarch64 -mcpu=help lists those of ARM"
    )


@app.command()
def run(
    cpus: Annotated[list[str], typer.Argument(help="LLVM's names, such as neoverse-n1, apple-m1, haswell or znver4.")],
) -> None:
    """Predict how close the inner loops come to the peak of multiply-adds on other CPUs (needs llvm-mca)."""
    analyzer = newest_analyzer()
    if analyzer is None:
        raise typer.BadParameter(
            "llvm-mca is not installed: it is a part of LLVM (on Debian and Ubuntu: apt install llvm)"
        )
    targets = [(triple_of(analyzer, cpu), cpu) for cpu in cpus]
    table = Table("CPU", "peak, per cycle", "dense", "few rows", "sparse", box=SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    for target, compiled in zip(targets, loops_of(targets)):
        if not compiled[0].multiply_adds:
            raise typer.BadParameter(f"{target[1]} has no fused multiply-add")
        peak = rate(multiply_adds_only(compiled[0]), analyzer, *target)
        table.add_row(target[1], f"{peak:.2f}", *(f"{rate(loop, analyzer, *target) / peak:.0%}" for loop in compiled))
    console = Console()
    console.print(f"Vector multiply-adds per cycle, float32, and the products' share of that peak, by {analyzer}")
    console.print(table)


if __name__ == "__main__":
    from kernels.ladder.__main__ import main  # which imports the kernels, as the processes of the pool must not

    main(app)
