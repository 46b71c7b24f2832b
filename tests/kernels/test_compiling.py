"""Kernels are compiled for the CPU and the settings, and never run stale code."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from kernels import simd

ROOT = Path(__file__).parents[2]

# Prints: seconds spent compiling, bytes of a register, whether matmul is right, relu of -1, and the
# gradient of equal logits.
PROBE = textwrap.dedent("""
    from concurrent.futures import ThreadPoolExecutor
    import sys
    import numpy as np
    from kernels import get_backend, simd
    from kernels.compiling import compile_seconds
    backend = get_backend("numba")
    right = True
    for dtype in sys.argv[1:]:
        for m, k, n in [(13, 7, 139), (150, 20, 10), (100, 801, 64), (1, 1, 1), (2, 0, 3)]:
            a, b, bias = (np.arange(size, dtype=dtype) % 7 for size in [m * k, k * n, n])
            a, b = a.reshape(m, k), b.reshape(k, n)
            with ThreadPoolExecutor(4) as pool:
                for left in a, np.asfortranarray(a):
                    futures = [pool.submit(backend.matmul, left, b, bias) for _ in range(4)]
                    right &= all(np.array_equal(future.result(), a @ b + bias) for future in futures)
    relu = backend.relu(-np.ones((1, 1), np.float32)).item()
    gradient = backend.softmax_grad(np.zeros((1, 2), np.float32), np.zeros(1, int))[2][0, 1]
    print(compile_seconds(), simd.REGISTER_BYTES, right, relu, gradient)
""")


def start_probe(*dtypes, code=PROBE, folder=ROOT, **environment):
    unset = {"NUMBA_CACHE_DIR", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"}
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    return subprocess.Popen(
        [sys.executable, "-c", code, *dtypes],
        cwd=folder,
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(probe):
    output, errors = probe.communicate(timeout=600)
    assert probe.returncode == 0, errors
    seconds, register_bytes, right, relu, gradient = output.split()
    return float(seconds), int(register_bytes), right == "True", float(relu), float(gradient)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "register_bytes"),
    [
        ({"NUMBA_CPU_NAME": "generic"}, 16),
        ({"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma"}, 32),
    ],
    ids=["generic", "haswell"],
)
def test_products_are_right_on_a_cpu_with_narrower_vectors(settings, register_bytes):
    if register_bytes > simd.REGISTER_BYTES:
        pytest.skip("this CPU has no vectors as wide")
    assert finish(start_probe("f4", "f8", **settings))[1:] == (register_bytes, True, 0, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("chosen_by_user", [False, True])
def test_an_edit_of_either_file_compiles_anew(chosen_by_user, tmp_path):
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")} if chosen_by_user else {}

    def run():
        return finish(start_probe(folder=tmp_path, **environment))

    def edit(file, old, new):
        path = tmp_path / "kernels" / file
        source = path.read_text()
        assert source.count(old) == 1
        path.write_text(source.replace(old, new))

    seconds, *_, relu, gradient = run()
    assert seconds > 0
    assert (relu, gradient) == (0, 0.5)
    assert run()[0] == 0
    edit("simd.py", "self.fma(result, r, constant(1 /", "self.fma(result, r, constant(0 *")
    assert np.isnan(run()[4])  # e^0 is now 0
    edit("numba_backend.py", "    zero_negative(z.ravel())", "    z[:] = 7")
    assert run()[3] == 7


@pytest.mark.slow
def test_two_processes_that_start_on_an_empty_cache_fill_it_together(tmp_path):
    """They compile the same kernels at the same time; a later process finds them."""
    both = [start_probe(NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2)]
    for seconds, *_, relu, gradient in map(finish, both):
        assert seconds > 0
        assert (relu, gradient) == (0, 0.5)
    seconds, *_, relu, gradient = finish(start_probe(NUMBA_CACHE_DIR=str(tmp_path)))
    assert seconds == 0
    assert (relu, gradient) == (0, 0.5)


@pytest.mark.slow
def test_an_unwritable_cache_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    seconds, *_, relu, gradient = finish(start_probe(NUMBA_CACHE_DIR=str(tmp_path / "file" / "folder")))
    assert seconds > 0
    assert (relu, gradient) == (0, 0.5)


@pytest.mark.slow
def test_settings_that_change_the_code_do_not_share_a_cache(tmp_path):
    """Each run sees a cache filled under other settings, and compiles; a repeated setting reuses its own entry."""
    settings = {
        "NUMBA_OPT": "0",
        "NUMBA_BOUNDSCHECK": "1",
        "NUMBA_DEBUGINFO": "1",
        "NUMBA_LOOP_VECTORIZE": "0",
        "NUMBA_SLP_VECTORIZE": "1",
    }

    def run(**environment):
        seconds, *_, relu, gradient = finish(start_probe(NUMBA_CACHE_DIR=str(tmp_path), **environment))
        assert (relu, gradient) == (0, 0.5)
        return seconds

    assert run() > 0
    for name, value in settings.items():
        assert run(**{name: value}) > 0, name
    assert run() == 0
    assert run(NUMBA_OPT="0") == 0


@pytest.mark.slow
def test_a_setting_changed_after_the_import_does_not_share_a_cache_either(tmp_path):
    change = 'import os, kernels.compiling\nos.environ["NUMBA_OPT"] = "0"\n'
    finish(start_probe(code=change + PROBE, NUMBA_CACHE_DIR=str(tmp_path)))
    assert finish(start_probe(NUMBA_CACHE_DIR=str(tmp_path)))[0] > 0
    assert finish(start_probe(NUMBA_CACHE_DIR=str(tmp_path), NUMBA_OPT="0"))[0] == 0


@pytest.mark.slow
def test_a_damaged_cache_file_is_compiled_again(tmp_path):
    def run():
        seconds, *_, relu, gradient = finish(start_probe(NUMBA_CACHE_DIR=str(tmp_path)))
        assert (relu, gradient) == (0, 0.5)
        return seconds

    damages = {
        "empty": lambda content: b"",
        "cut short": lambda content: content[: len(content) // 2],
        "zeros inside": lambda content: content[: len(content) // 2] + bytes(len(content) // 4) + content[-999:],
        "no code": lambda content: b"nothing that was ever compiled",
    }
    run()
    for name, damage in damages.items():
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        for path in files:
            path.write_bytes(damage(path.read_bytes()))
        assert files
        assert run() > 0, name
        assert run() == 0, name


@pytest.mark.slow
@pytest.mark.parametrize("full_at", ["write_bytes", "mkdir"])
def test_a_full_disk_gives_one_warning(full_at, tmp_path):
    """As if the disk were full at the first write, or at the first folder."""
    code = textwrap.dedent(f"""
        import errno, os, pathlib
        def full(*arguments, **options):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        pathlib.Path.{full_at} = full
    """)
    probe = start_probe(code=code + PROBE, NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    output, errors = probe.communicate(timeout=600)
    assert probe.returncode == 0, errors
    assert float(output.split()[0]) > 0
    (line,) = errors.splitlines()
    assert str(tmp_path) in line
    assert "No space left on device" in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_without_the_compiler_one_line_names_the_variable():
    """Where a backend is asked for as well as where a kernel first runs."""
    code = textwrap.dedent("""
        import os
        from kernels import get_backend
        try:
            get_backend("numba")
        except ValueError as error:
            print(error)
        del os.environ["NUMBA_DISABLE_JIT"]
        import numba
        numba.config.reload_config()
        numba.config.DISABLE_JIT = 0
        backend = get_backend("numba")
        os.environ["NUMBA_DISABLE_JIT"] = "1"
        import numpy as np
        try:
            backend.relu(np.zeros((2, 2), np.float32))
        except ValueError as error:
            print(error)
    """)
    probe = start_probe(code=code, NUMBA_DISABLE_JIT="1")
    output, errors = probe.communicate(timeout=600)
    assert (probe.returncode, errors) == (0, "")
    first, second = output.splitlines()
    assert first == second
    assert first.startswith("NUMBA_DISABLE_JIT is set")
