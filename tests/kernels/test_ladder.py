"""Every step of the ladder computes the same product, and its command line shows it."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import typer

from kernels.ladder.assembly import hottest_block, machine_code
from kernels.ladder.mca import TRIPLES, loops_of, newest_analyzer, triple_of
from kernels.ladder.steps import STEPS, in_threads
from tests.support.reference import assert_product

# Around the tiles' 4 and 16 rows and 128 columns and the four steps of k, with remainders of all of them and without.
SHAPES = [(1, 1, 1), (2, 3, 1), (5, 4, 3), (4, 8, 128), (3, 2, 129), (16, 5, 127), (17, 7, 130), (33, 1, 257)]


def product(step, a, b, threads=1):
    out = np.full((len(a), b.shape[1]), np.nan, a.dtype)
    if step == "loops":
        lists = out.tolist()
        in_threads(STEPS[step], a.tolist(), b.tolist(), lists, threads)
        out[:] = lists
    else:
        in_threads(STEPS[step], a, b, out, threads)
    return out


@pytest.mark.parametrize("step", STEPS)
def test_product(step):
    rng = np.random.default_rng(0)
    for m, k, n in SHAPES:
        a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((m, k), (k, n)))
        for threads in (1, 2, 3):
            assert_product(product(step, a, b, threads), a, b)


@pytest.mark.parametrize("step", [step for step in STEPS if step != "loops"])
def test_empty_products(step):
    for m, k, n in ((0, 3, 2), (3, 0, 2), (3, 2, 0)):
        np.testing.assert_array_equal(product(step, np.ones((m, k), "f"), np.ones((k, n), "f")), np.zeros((m, n)))


@pytest.mark.slow
@pytest.mark.parametrize("step", [step for step in STEPS if step != "loops"])
def test_vectors_appear_with_the_third_step(step):
    block = "\n".join(hottest_block(machine_code(step)))
    on_arm = r"fml?a\w*(\s.*)?\.4s"  # fmla v0.4s, v1.4s, …; Apple writes fmla.4s v0, v1, …
    packed = r"mul\w*ps|fm\w+ps" if re.search("[xyz]mm", block) else on_arm
    assert bool(re.search(packed, block)) == (step != "compiled"), block


def run_ladder(*arguments, module="kernels.ladder"):
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_narrow_ascii_terminal_truncates_no_number(monkeypatch):
    monkeypatch.setenv("COLUMNS", "10")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    result = run_ladder("loops", "--size", "16")
    assert result.returncode == 0, result.stderr
    assert re.search(r"loops[ |]+16[ |]+[\d.e-]+[ |]+[\d.e-]+[ |]*\n", result.stdout), result.stdout


@pytest.mark.slow
def test_command_line():
    result = run_ladder("packed", "--size", "64", "--asm")
    assert result.returncode == 0, result.stderr
    assert re.search(r"packed +64 +[\d.e+]+ +[\d.e+]+", result.stdout)
    assert re.search(r"mul|fm", result.stdout.partition("Step 6")[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fast"], "there is no step 'fast': choose one of loops, compiled, "),
        (["--size", "0"], "Invalid value for '--size'"),
        (["--size", str(10**20)], "Invalid value for '--size'"),
        (["--size", str(10**6)], "too large for this machine (Unable to allocate 3.64 TiB"),
        (["--frobnicate"], "No such option: --frobnicate"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments, message):
    result = run_ladder(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"error: .*\n", result.stderr), result.stderr
    assert message in result.stderr


@pytest.mark.parametrize("module", ["kernels.ladder", "kernels.ladder.mca"])
def test_without_the_compiler_there_is_one_line(module, monkeypatch):
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    result = run_ladder("haswell", module=module)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"error: NUMBA_DISABLE_JIT is set, .*: unset it\n", result.stderr), result.stderr


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_disk_is_one_line(monkeypatch):
    """Python buffers stdout, unless PYTHONUNBUFFERED is set."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    command = [sys.executable, "-m", "kernels.ladder", "packed", "--size", "64"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert result.returncode == 2
    assert re.fullmatch(r"error: .*No space left on device\n", result.stderr), result.stderr


@pytest.mark.slow
def test_a_cpu_that_llvm_aborts_for_is_named():
    """LLVM ends the process, which must not leave its parent waiting. The other CPU compiles."""
    with pytest.raises(ValueError, match="LLVM cannot compile for i386"):
        loops_of([CPUS[0], (TRIPLES[0], "i386")])


@pytest.mark.skipif(newest_analyzer() is None, reason="llvm-mca, a part of LLVM, is not installed")
@pytest.mark.parametrize("cpu", ["", "help", "no-such-cpu"])
def test_no_cpu(cpu):
    with pytest.raises(typer.BadParameter, match=f"LLVM knows no CPU called '{cpu}'"):
        triple_of(newest_analyzer(), cpu)


@pytest.mark.skipif(newest_analyzer() is None, reason="llvm-mca, a part of LLVM, is not installed")
@pytest.mark.parametrize("cpu", ["carmel", "i386"])
def test_a_cpu_without_a_model(cpu):
    with pytest.raises(typer.BadParameter, match=f"has no model of {cpu}"):
        triple_of(newest_analyzer(), cpu)


# AVX2 and AVX-512 on Intel, old and new, and on AMD; NEON.
CPUS = [(TRIPLES[0], cpu) for cpu in ("haswell", "znver3", "skylake-avx512", "sapphirerapids", "znver4")]
CPUS.append((TRIPLES[1], "neoverse-n1"))


@pytest.mark.slow
def test_accumulators_stay_in_registers_on_other_cpus():
    for (_, cpu), compiled in zip(CPUS, loops_of(CPUS)):
        for loop in compiled:
            code = "\n".join(loop.instructions)
            assert loop.multiply_adds >= 8, (cpu, code)
            spills = re.findall(r"vmov.*\(%rsp\)|vmov\w+\s+%[xyz]mm\d+, %[xyz]mm\d+|\[sp|mov\s+v\d+", code)
            assert not spills, (cpu, code)


@pytest.mark.slow
@pytest.mark.skipif(newest_analyzer() is None, reason="llvm-mca, a part of LLVM, is not installed")
def test_predictions_for_other_cpus():
    result = run_ladder("neoverse-n1", "haswell", module="kernels.ladder.mca")
    assert result.returncode == 0, result.stderr
    dense = [int(share) for share in re.findall(r"(?:neoverse-n1|haswell) +\S+ +(\d+)%", result.stdout)]
    assert len(dense) == 2
    assert min(dense) >= 95, result.stdout
    unknown = run_ladder("no-such-cpu", module="kernels.ladder.mca")
    assert unknown.returncode == 2
    assert re.fullmatch(r"error: .*LLVM knows no CPU called 'no-such-cpu'.*\n", unknown.stderr)
