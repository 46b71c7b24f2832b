"""The command line as a user sees it: in separate processes."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from model import published
from model.cli.options import parse_bytes
from model.data import limited
from model.training import TrainingError
from tests.support.idx import write_idx
from tests.support.runs import run_model
from tests.support.systems import needs_posix

TRAIN = ("train", "--dataset", "digits28", "--limit", "600", "--epochs", "3", "--backend", "numpy")


def test_train_writes_settings_and_history(tmp_path):
    file = tmp_path / "history.json"
    result = run_model(*TRAIN, "--json", file, "--threads", 2, "--eval-every", 2, "--hidden", 16)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # no progress bar without a terminal
    assert "numpy on digits28, 2 threads" in result.stdout
    content = json.loads(file.read_text())
    assert content["config"] == {
        "backend": "numpy",
        "dataset": "digits28",
        "limit": 600,
        "hidden": 16,
        "epochs": 3,
        "learning_rate": 0.3,
        "batch_size": None,
        "seed": 0,
        "threads": 2,
        "eval_every": 2,
    }
    assert content["environment"]["packages"]["numpy"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", content["environment"]["llvm"])
    assert content["prepare_seconds"] > 0
    assert content["compile_seconds"] == 0
    assert [epoch["epoch"] for epoch in content["history"]] == [1, 2, 3]
    keys = {"epoch", "loss", "train_accuracy", "test_accuracy", "seconds"}
    assert all(set(epoch) == keys for epoch in content["history"])
    assert [epoch["test_accuracy"] is None for epoch in content["history"]] == [True, False, False]
    assert [path.name for path in tmp_path.iterdir()] == ["history.json"]


def test_a_long_history_stays_readable():
    result = run_model(*TRAIN[:-3], 40, "--backend", "numpy", "--limit", 50, "--hidden", 4)
    rows = re.findall(r"^ +(\d+) +\d\.\d{4} +[\d.]+% +[\d.]+% +\d\.\d{3}", result.stdout, re.MULTILINE)
    assert (rows[0], rows[-1]) == ("1", "40")
    assert len(rows) <= 12


@needs_posix
def test_a_terminal_shows_a_progress_bar():
    import pty

    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "model", *TRAIN]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=terminal, check=True, timeout=60)
    os.close(terminal)
    assert "numpy on digits28" in os.read(main, 100_000).decode()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "cupy"], "unknown backend 'cupy': choose one of naive, numpy"),
        (["--epochs", "0"], "epochs and eval_every must be at least 1, not 0 and 1"),
        (["--epochs", str(2**63)], "Invalid value for '--epochs'"),
        (["--eval-every", str(2**63)], "Invalid value for '--eval-every'"),
        (["--epochs", "many"], "Invalid value for '--epochs'"),
        (["--learning-rate", "-1"], "learning_rate must be positive"),
        (["--learning-rate", "1e30"], "try a smaller learning rate"),
        (["--learning-rate", "3e40"], "try a smaller learning rate"),
        (["--learning-rate", "1e-44"], "is 0 in float32: raise it"),
        (["--hidden", "1000000000"], "too large for this machine"),
        (["--hidden", "9" * 40], "Input should be less than or equal to 1000000000"),
        (["--memory-limit", "much"], "'much' is not a number of bytes: write it like '500 MB'"),
        (["--memory-limit", "1.2.3 GB"], "'1.2.3 GB' is not a number of bytes"),
        (["--memory-limit", "-5"], "'-5' is not a number of bytes"),
        (["--memory-limit", "9" * 400], "too large for this machine"),
        pytest.param(["--checkpoint", "/dev/fd/loop"], "cannot write", marks=needs_posix),
        (["--batch-size", "601"], "batch_size must be from 1 to 600"),
        (["--limit", "0"], "choose 1 to 60000"),
        (["--hidden", "0"], "Invalid value for '--hidden'"),
        (["--seed", "-1"], "Invalid value for '--seed'"),
        (["--seed", str(2**63)], "Invalid value for '--seed'"),
        (["--scheduler", ""], "--scheduler needs an address"),
        (["--threads", "0"], "threads must be at least 1"),
        (["--dataset", "cifar"], "Unknown dataset 'cifar'"),
        (["--dataset", "mnist", "--data", "/nowhere"], "there is no folder /nowhere: pass the one with"),
        (["--json", "/no/such/folder/x.json"], "there is no folder /no/such/folder"),
        (["--json", "/"], "it is a folder"),
        (["--frobnicate"], "No such option: --frobnicate"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(main, arguments, message):
    code, shown, error = main(*TRAIN, *arguments)
    assert (code, shown) == (2, "")
    assert re.fullmatch(r"error: .*\n", error), error
    assert message in error


@pytest.mark.parametrize(
    ("text", "size"), [("7", 7), ("500 MB", 5 * 10**8), ("1.5kB", 1500), ("2 GiB", 2**31), ("0", 0)]
)
def test_parse_bytes(text, size):
    assert parse_bytes(text) == size


def test_an_error_is_all_that_a_process_prints():
    result = run_model(*TRAIN, "--learning-rate", "1e30")
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"error: .* try a smaller learning rate\n", result.stderr)


@needs_posix
@pytest.mark.parametrize(
    ("arguments", "number", "exit_code"),
    [
        ((*TRAIN, "--epochs", "1000000"), signal.SIGINT, 130),
        (("reproduce", "--backend", "sparse", "--dataset", "digits28"), signal.SIGTERM, 143),
    ],
)
def test_interrupt_ends_cleanly(arguments, number, exit_code):
    import pty

    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "model", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, text=True)
    os.close(terminal)
    shown = os.read(main, 100_000)  # blocks until the progress bar appears
    process.send_signal(number)
    while chunk := read_terminal(main):
        shown += chunk
    stdout, _ = process.communicate(timeout=20)
    assert (process.returncode, stdout) == (exit_code, "")
    assert "stopping after the current step" in shown.decode()
    assert "interrupted" in shown.decode()
    assert "Traceback" not in shown.decode()


@needs_posix
@pytest.mark.parametrize("program", ["model", "bench"])
def test_ctrl_c_during_the_imports_ends_quietly(tmp_path, program):
    """A module that blocks replaces Typer, so the signal arrives during its import."""
    (tmp_path / "typer.py").write_text("print(flush=True); import time; time.sleep(60)")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", program]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen(command, **options) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == 130


@needs_posix
@pytest.mark.parametrize("name", ["run[bold]:100:\u2588.json", "x[/run].json", "\udce9"])
def test_file_names_are_printed_verbatim(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    result = subprocess.run(
        [sys.executable, "-m", "model", *TRAIN, "--checkpoint", name, "--json", f"{name}.json"],
        cwd=tmp_path,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert (result.returncode, result.stderr) == (0, b"")
    for line in (f"checkpoint written to {name}", f"history written to {name}.json"):
        assert os.fsencode(line) in result.stdout.splitlines()
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {name, f"{name}.json"}


@needs_posix
def test_a_symbolic_link_loop_is_a_one_line_error(main, tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    for option in ("--checkpoint", "--json", "--resume"):
        code, shown, error = main(*TRAIN, option, loop)
        assert (code, shown) == (2, "")
        assert re.fullmatch(r"error: .*loop.*\n", error)
    assert loop.is_symlink()


@pytest.mark.parametrize("columns", ["0", "10", "40"])
def test_narrow_terminals_truncate_nothing(columns):
    command = [sys.executable, "-m", "model", *TRAIN]
    environment = {**os.environ, "COLUMNS": columns}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    rows = re.findall(r"^ +(\d) \d\.\d{4} +\d+\.\d\d% +\d+\.\d\d% +\d\.\d{3}$", result.stdout, re.MULTILINE)
    assert rows == ["1", "2", "3"]


def test_help_shows_defaults_in_brackets(main):
    _, shown, _ = main("train", "--help")
    assert "[default: $MNIST_DIR" in " ".join(shown.split())


def read_terminal(terminal):
    try:
        return os.read(terminal, 100_000)
    except OSError:  # raised by Linux when the other end has been closed
        return b""


def test_every_command_has_help(main):
    _, overview, _ = main()
    for command in ([], ["train"], ["reproduce"], ["predict"]):
        code, shown, _ = main(*command, "--help")
        assert code == 0
        assert "--help" in shown
        assert (shown == overview) == (command == [])


@pytest.mark.slow
def test_reproduce_shows_both_tables_and_writes_report_and_figure(tmp_path, digits28):
    """250 epochs from two starts, over a thousand images."""
    write_idx(tmp_path, limited(digits28, 1000))
    data = ("--dataset", "idx", "--data", tmp_path)
    result = run_model("reproduce", "--backend", "sparse", "--starts", 2, *data, "--output", tmp_path)
    assert result.returncode == 0, result.stderr
    for text in ("train, published", "test, published", "92.21", "fitted", "This run used idx"):
        assert text in result.stdout
    content = json.loads((tmp_path / "reproduction.json").read_text())
    assert len(content["runs"]["sparse"]["history"]) == 250
    assert (tmp_path / "reproduction.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def few(digits28, tmp_path):
    """Options for a hundred images."""
    dataset = limited(digits28, 100)
    write_idx(tmp_path, dataset._replace(test_images=dataset.test_images[:50], test_labels=dataset.test_labels[:50]))
    return "--dataset", "idx", "--data", tmp_path


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_the_files_are_written_before_anything_is_printed(few, tmp_path, monkeypatch):
    """Stdout is closed, or on a full disk. Python buffers it, unless PYTHONUNBUFFERED is set."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    train = ("train", *few, "--epochs", 1, "--json", tmp_path / "history.json")
    reproduce = ("reproduce", *few, "--backend", "numpy", "--starts", 1, "--output", tmp_path)
    for command in (train, reproduce):
        with open("/dev/full", "w") as full:
            command = [sys.executable, "-m", "model", *map(str, command)]
            result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
        assert result.returncode == 2
        assert re.fullmatch(r"error: .*No space left on device\n", result.stderr), result.stderr
    for name, key in (("history.json", "history"), ("reproduction.json", "runs")):
        assert json.loads((tmp_path / name).read_text())[key]
    assert (tmp_path / "reproduction.png").read_bytes().startswith(b"\x89PNG")


def test_results_that_cannot_be_written_are_shown(main, few, tmp_path, monkeypatch):
    """The disk fills up during the run."""
    replace = Path.replace

    def full(part, file):
        if file.name in ("history.json", "reproduction.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(part, file)

    monkeypatch.setattr(Path, "replace", full)
    train = ("train", *few, "--epochs", 1, "--json", tmp_path / "history.json")
    reproduce = ("reproduce", *few, "--backend", "numpy", "--starts", 1, "--output", tmp_path)
    for command, row in ((train, r"^ +1 +\d\.\d{4} "), (reproduce, r"^ +test, published +35\.24 ")):
        code, shown, error = main(*command)
        assert code == 2
        assert re.search(row, shown, re.MULTILINE), shown
        assert re.fullmatch(r"error: cannot write .*\.json: No space left on device; .*\n", error), error


def test_an_error_in_a_later_run_loses_no_finished_one(main, monkeypatch, few, tmp_path):
    """Nor the last complete report. The next complete run removes the partial one."""
    run, complete, partial = published.run, tmp_path / "reproduction.json", tmp_path / "reproduction.partial.json"
    command = ("reproduce", *few, "--backend", "numpy", "--backend", "sparse", "--starts", 1, "--output", tmp_path)

    def failing(schedule, backend, *arguments):
        if backend.name == "sparse":
            raise TrainingError("the loss became nan")
        return run(schedule, backend, *arguments)

    complete.write_text('{"runs": {}}')
    monkeypatch.setattr(published, "run", failing)
    code, shown, error = main(*command)
    assert (code, shown) == (2, "")
    assert error.splitlines() == [
        f"finished before that: numpy; the results are in {partial}",
        "error: the loss became nan",
    ]
    assert len(json.loads(partial.read_text())["runs"]["numpy"]["history"]) == 250
    assert complete.read_text() == '{"runs": {}}'
    monkeypatch.setattr(published, "run", run)
    assert main(*command)[0] == 0
    assert list(json.loads(complete.read_text())["runs"]) == ["numpy", "sparse"]
    assert not partial.exists()


def test_a_figure_that_cannot_be_written_is_an_error_before_the_first_run(main, few, tmp_path):
    (tmp_path / "reproduction.png").mkdir()
    code, shown, error = main("reproduce", *few, "--backend", "numpy", "--output", tmp_path)
    assert (code, shown) == (2, "")
    assert re.fullmatch(r"error: cannot write .*reproduction.png: it is a folder .*\n", error), error


def test_too_few_images_are_refused_before_the_first_run(main, few, tmp_path):
    code, shown, error = main("reproduce", *few, "--output", tmp_path)
    assert (code, shown) == (2, "")
    assert re.fullmatch(r"error: naive trains on 15,000 images, but idx has only 100: .*\n", error), error
    assert not list(tmp_path.glob("*.json"))
