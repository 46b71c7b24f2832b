"""Ctrl-C, SIGTERM and a closed terminal stop a run after its step, with nothing lost."""

import os
import signal
import subprocess
import sys
import time

import pytest

from model.extras.checkpoint import load
from tests.support.runs import TRAIN, assert_same, progress, start, wait_for
from tests.support.systems import needs_posix


@needs_posix
@pytest.mark.parametrize(
    ("name", "exit_code"),
    [
        ("SIGINT", 130),
        pytest.param("SIGTERM", 143, marks=pytest.mark.slow),
        pytest.param("SIGHUP", 129, marks=pytest.mark.slow),
    ],
)
def test_a_signal_is_deferred_to_the_end_of_the_step_and_saves(main, tmp_path, name, exit_code):
    """Sent twice in quick succession, as some process managers do, it counts once."""
    file = tmp_path / "run"
    process = start(*TRAIN, "--epochs", 10**6, "--checkpoint", file)
    wait_for(file, process)
    time.sleep(0.5)  # epochs that the file does not have yet
    for _ in range(2):
        process.send_signal(getattr(signal, name))
    shown, error = process.communicate(timeout=60)
    assert (process.returncode, shown) == (exit_code, "")
    assert error.splitlines() == [
        "stopping after the current step; a second signal stops at once",
        f"interrupted, saved in {file}: continue with --resume {file}",
    ]
    assert progress(load(file).state) > (0, 0)
    epochs = len(load(file).state.history.epochs) + 3
    assert main("train", "--resume", file, "--epochs", epochs)[0] == 0
    assert main(*TRAIN, "--epochs", epochs, "--checkpoint", tmp_path / "whole")[0] == 0
    assert_same(load(file), load(tmp_path / "whole"))


@pytest.mark.slow
@needs_posix
@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_stops_at_once(tmp_path, number, exit_code):
    file = tmp_path / "run"
    process = start(*TRAIN[:3], "--limit", 3_000, "--backend", "naive", "--checkpoint", file)  # steps of 40 seconds
    wait_for(file, process)
    time.sleep(0.5)  # until the first step has begun
    process.send_signal(number)
    assert process.stderr.readline().startswith("stopping after the current step")
    process.send_signal(number)  # the same, sent twice
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (exit_code, "interrupted\n")
    assert progress(load(file).state) == (0, 0)
    assert list(tmp_path.iterdir()) == [file]


@needs_posix
def test_signals_are_ignored_during_exit_and_if_they_were_before():
    """An impatient second Ctrl-C must not interrupt the cleanup, and Ctrl-C must not stop a background job."""
    program = """if True:
        import os, signal
        from model.signals import Stopped, stoppable
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with stoppable():
            os.kill(os.getpid(), signal.SIGINT)
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except Stopped as stopped:
                os.kill(os.getpid(), signal.SIGTERM)
                print(stopped.signal)
    """
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "15\n", "")


@needs_posix
def test_a_second_signal_while_the_first_is_handled_counts_as_the_same():
    program = """if True:
        import os, signal, time
        from model import signals
        monotonic, pending = time.monotonic, [signal.SIGTERM]
        def interrupted_clock():
            if pending:
                os.kill(os.getpid(), pending.pop())
            return monotonic()
        with signals.stoppable_between_steps() as received:
            signals.time.monotonic = interrupted_clock
            os.kill(os.getpid(), signal.SIGTERM)
        print(*map(int, received))
    """
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    notice = "stopping after the current step; a second signal stops at once\n"
    assert (result.returncode, result.stdout, result.stderr) == (0, "15\n", notice)


@needs_posix
@pytest.mark.filterwarnings("ignore:.*JAX is multithreaded:RuntimeWarning")  # where other tests have imported it
def test_a_closed_terminal_saves(tmp_path):
    """The system sends SIGHUP, and writing to the terminal fails."""
    import pty

    file = tmp_path / "run"
    child, terminal = pty.fork()
    if child == 0:
        command = [sys.executable, "-m", "model", *map(str, TRAIN), "--epochs", "1000000", "--checkpoint", str(file)]
        os.execv(command[0], command)
    os.read(terminal, 1)  # the bar
    while not file.exists():
        os.read(terminal, 1000)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 129
    assert progress(load(file).state) > (0, 0)
    assert list(tmp_path.iterdir()) == [file]
