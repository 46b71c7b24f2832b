"""Checkpoints: a resumed run ends with the bits of an uninterrupted one, and no crash or forgery does any harm."""

import errno
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import safetensors.numpy

import model.cli.train as command_line
from kernels.numpy_backend import NumpyBackend
from model import files
from model.data import limited
from model.extras import checkpoint
from model.extras.checkpoint import Checkpoint, CheckpointError, Config, load, save
from model.files import locked
from model.mlp import MLP
from model.training import Epoch, State, train
from tests.support import kills
from tests.support.runs import TRAIN, assert_same, progress, start, wait_for
from tests.support.systems import needs_posix, needs_proc

SIZES = (25, 6, 10)
CONFIG = Config("numpy", "tiny", "0" * 64, None, 6, 0.3, 1200, 0, 2, 2)


@pytest.fixture
def file(tmp_path):
    """A checkpoint in the middle of the second epoch, alone in its folder."""
    mlp, state = MLP(SIZES), State.start(0)
    state.history.epochs = [Epoch(1, 2.3, 0.1, None, 0.5), Epoch(2, 2.2, 0.2, 0.25, 0.5)]
    state.steps, state.loss, state.correct, state.seconds = 3, 1.1, 7, 0.1
    save(tmp_path / "run.safetensors", mlp, state, CONFIG)
    return tmp_path / "run.safetensors"


# Resuming


@pytest.mark.parametrize("batch_size", [None, 300])
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(backend, tiny, tmp_path, batch_size):
    """Resumed before the first step, after each step and each epoch, on a different number of threads."""
    mlp, files, dataset = MLP(SIZES), [], limited(tiny, 1100)  # two shards
    options = {"epochs": 2, "batch_size": batch_size, "eval_every": 2}

    def on_step(state):
        files.append(tmp_path / f"{len(files)}")
        save(files[-1], mlp, state, CONFIG)

    train(mlp, backend, dataset, **options, threads=1, on_step=on_step)
    assert len(files) == (5 if batch_size is None else 11)
    expected = load(files[-1])
    for stopped in files[:-1]:
        run = load(stopped)
        history = train(run.mlp, backend, dataset, **options, threads=3, state=run.state)
        assert history is run.state.history
        assert_same(run, expected)


@pytest.mark.parametrize(("meant", "done", "epochs"), [(3, 3, 5), (3, 3, 6), (5, 3, 3), (5, 4, 5), (5, 5, 5)])
def test_resuming_with_more_epochs_equals_one_longer_run(tiny, meant, done, epochs):
    """Includes the test accuracy after the last epoch, which is measured even if `eval_every` skips that epoch."""
    run, expected = (Checkpoint(MLP(SIZES), State.start(0), CONFIG) for _ in range(2))
    options = {"batch_size": 600, "eval_every": 2}

    def stop(state):
        if len(state.history.epochs) == done:
            raise StopIteration

    with pytest.raises(StopIteration):
        train(run.mlp, NumpyBackend(), tiny, epochs=meant, **options, state=run.state, on_step=stop)
    train(run.mlp, NumpyBackend(), tiny, epochs=epochs, **options, state=run.state)
    train(expected.mlp, NumpyBackend(), tiny, epochs=epochs, **options, state=expected.state)
    assert_same(run, expected)


def test_save_and_load_round_trip(file):
    first = load(file)
    again = file.with_name("again")
    save(again, *first)
    assert_same(load(again), first)
    assert first.config == CONFIG
    assert first.state.history.epochs[0] == (1, 2.3, 0.1, None, 0.5)
    assert (first.state.steps, first.state.loss, first.state.correct, first.state.seconds) == (3, 1.1, 7, 0.1)
    assert first.state.rng == State.start(0).rng
    for ours, theirs in zip(first.mlp.parameters, MLP(SIZES).parameters):
        np.testing.assert_array_equal(ours, theirs, strict=True)
        assert ours.flags.writeable


def test_a_state_from_another_run_is_an_error(tiny):
    state = State.start(0)
    state.steps = 6
    with pytest.raises(
        ValueError,
        match="the state has done 6 steps, but an epoch here has only 5: resume with the same data and batch size",
    ):
        train(MLP(SIZES), NumpyBackend(), tiny, epochs=2, batch_size=600, state=state)
    state.steps, state.history.epochs = 0, [Epoch(1, 0, 0, 0, 0)] * 3
    with pytest.raises(ValueError, match="3 epochs have been started: epochs must be at least 3, not 2"):
        train(MLP(SIZES), NumpyBackend(), tiny, epochs=2, state=state)
    state.steps = 1
    with pytest.raises(ValueError, match="4 epochs have been started: epochs must be at least 4, not 3"):
        train(MLP(SIZES), NumpyBackend(), tiny, epochs=3, batch_size=600, state=state)


# Writing


def fail_to(function, monkeypatch):
    def fails(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(function, fails)


@pytest.mark.parametrize("function", ["os.fsync", "pathlib.Path.replace"])
def test_a_full_disk_leaves_the_old_file(file, monkeypatch, function):
    before, run = file.read_bytes(), load(file)
    run.state.steps += 1
    fail_to(function, monkeypatch)
    with pytest.raises(
        OSError, match=r"cannot write .*run\.safetensors: No space left on device; the previous content is untouched"
    ):
        save(file, *run)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


@needs_posix
def test_a_file_size_limit_leaves_the_old_file(file):
    import resource

    before, run = file.read_bytes(), load(file)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - 1, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*: File too large"):
            save(file, *run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


@needs_posix
@pytest.mark.parametrize(("function", "steps"), [("os.fsync", 3), ("pathlib.Path.replace", 3), ("os.open", 4)])
def test_killed_during_a_write(file, function, steps):
    """Before the new file is synced to disk, before it is renamed, and right after."""
    kill = "lambda *_: os.kill(os.getpid(), signal.SIGKILL)"
    code = f"run.state.steps += 1; {function} = {kill}; save(file, *run)"
    imports = "import os, pathlib, signal; from model.extras.checkpoint import load, save"
    program = f"{imports}; file = pathlib.Path({str(file)!r}); run = load(file); {code}"
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    run = load(file)
    assert run.state.steps == steps
    assert len(list(file.parent.glob(".*.part"))) == (1 if steps == 3 else 0)
    save(file, *run)
    assert list(file.parent.iterdir()) == [file]


def test_saving_a_non_finite_parameter_is_an_error(file):
    before, run = file.read_bytes(), load(file)
    run.mlp.layers[1][0][2, 3] = np.nan
    with pytest.raises(CheckpointError, match=r"cannot save .*: layers\.1\.weights is not finite"):
        save(file, *run)
    assert file.read_bytes() == before


def transposed(array):
    return np.ascontiguousarray(array.T).T


def strided(array):
    return np.repeat(array, 2, axis=0)[::2]


def big_endian(array):
    return array.astype(">f4")


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("change", [transposed, strided, big_endian, read_only])
def test_parameters_in_any_layout_are_saved(file, change):
    expected = load(file)
    mlp = MLP(SIZES)
    mlp.layers = [(change(weights), change(bias)) for weights, bias in mlp.layers]
    save(file, mlp, expected.state, CONFIG)
    assert_same(load(file), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda array: array.astype(np.float64), "layers.0.weights is float64, not float32"),
        (lambda array: array.astype(np.float16), "layers.0.weights is float16, not float32"),
        (lambda array: array.astype(np.int32), "layers.0.weights is int32, not float32"),
        (lambda array: array[:1], "layers.0.weights has shape (1, 6), not (1, 1)"),
        (lambda array: array[None], "layers.0.weights has shape"),
    ],
)
def test_parameters_that_could_not_be_loaded_are_refused(file, change, message):
    before, run = file.read_bytes(), load(file)
    run.mlp.layers = [(change(weights), change(bias)) for weights, bias in run.mlp.layers]
    with pytest.raises(CheckpointError, match=re.escape(f"cannot save {file}: ") + ".*") as caught:
        save(file, *run)
    assert message in str(caught.value) or "its layer sizes are not those of a network" in str(caught.value)
    assert file.read_bytes() == before


def test_numpy_scalars_are_saved_as_python_numbers(file):
    expected = load(file)
    numbers = {"hidden": np.int64(6), "learning_rate": np.float32(0.5), "batch_size": np.uint16(1200)}
    numbers |= {"seed": np.int32(0), "epochs": np.int8(2), "eval_every": np.int64(2)}
    state = expected.state
    state.steps, state.loss, state.correct, state.seconds = np.int64(3), np.float32(1.5), np.int64(7), np.float64(0.5)
    save(file, expected.mlp, state, CONFIG._replace(**numbers))
    again = load(file)
    assert again.config == CONFIG._replace(learning_rate=0.5)
    assert (again.state.steps, again.state.loss, again.state.correct, again.state.seconds) == (3, 1.5, 7, 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": os.fsencode("x")}, "a checkpoint cannot hold b'x', of type bytes"),
        ({"seed": np.arange(3)}, ", of type ndarray"),
        ({"seed": 2**63}, "its seed is not a whole number"),
        ({"hidden": 7}, "its layer sizes are not those"),
        ({"learning_rate": float("nan")}, "its learning_rate is not a finite number"),
        ({"backend": "x" * 70_000}, "its settings take more than the limit of 65,536 bytes"),
    ],
)
def test_settings_that_could_not_be_loaded_are_refused(file, changes, message):
    before, run = file.read_bytes(), load(file)
    with pytest.raises(CheckpointError) as caught:
        save(file, run.mlp, run.state, CONFIG._replace(**changes))
    assert str(caught.value).startswith(f"cannot save {file}: ")
    assert message in str(caught.value)
    assert file.read_bytes() == before


# Concurrent writers


HOLD = """if True:
    import pathlib, sys
    from model.files import locked
    with locked(pathlib.Path(sys.argv[1])):
        print("locked", flush=True)
        sys.stdin.read()
"""


@pytest.fixture
def holder(file):
    """A process that holds the lock."""
    command = [sys.executable, "-c", HOLD, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_file_locked_by_another_process_is_not_written(file, holder, monkeypatch):
    before, run = file.read_bytes(), load(file)
    part = file.with_name(f".{file.name}.{holder.pid}.part")
    part.touch()
    monkeypatch.setattr(files, "LOCK_TIMEOUT", 0.1)
    with pytest.raises(OSError, match=rf"run\.safetensors is in use by process {holder.pid}: wait until"):
        save(file, *run)
    assert part.exists()
    assert file.read_bytes() == before


def test_a_killed_process_leaves_no_lock(file, holder):
    run = load(file)
    holder.kill()
    holder.wait()
    save(file, *run)
    assert list(file.parent.iterdir()) == [file]


def test_a_writer_waits_for_the_lock(file, holder):
    run = load(file)
    threading.Timer(0.3, holder.kill).start()
    save(file, *run)
    assert list(file.parent.iterdir()) == [file]


def test_threads_that_save_to_one_file_take_turns(file):
    run = load(file)
    with ThreadPoolExecutor(4) as pool:
        for saved in [pool.submit(save, file, *run) for _ in range(40)]:
            saved.result()
    assert_same(load(file), run)
    assert list(file.parent.iterdir()) == [file]


def test_the_lock_is_reentrant(file):
    run = load(file)
    with locked(file), locked(file.parent / "x" / ".." / file.name):
        save(file, *run)
        assert file.with_name(f".{file.name}.lock").exists()
    assert list(file.parent.iterdir()) == [file]


@needs_posix
def test_files_are_written_without_lock_support(file, monkeypatch):
    """Some network file systems have no locks, so a temporary file there may be of a live process."""

    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    run, part = load(file), file.with_name(f".{file.name}.1.part")
    part.touch()
    save(file, *run)
    assert sorted(file.parent.iterdir()) == [part, file]


def test_a_symbolic_link_is_followed(file):
    link = file.with_name("latest")
    link.symlink_to(file)
    run = load(link)
    run.state.steps += 1
    save(link, *run)
    assert link.is_symlink()
    assert load(file).state.steps == 4


# Reading


def forged(file, **changes):
    """The checkpoint with other values, tensors, or texts of its metadata, and with a checksum that fits."""
    tensors = safetensors.numpy.load_file(file)
    with safetensors.safe_open(file, "np") as stored:
        texts = stored.metadata()
    values = json.loads(texts["run"])
    for name, value in changes.items():
        target = values if name in values else texts if name in texts else tensors
        target[name.replace("__", ".")] = value
    for part in (values, tensors):
        for name in [name for name, value in part.items() if value is MISSING]:
            del part[name]
    if "run" not in changes:
        texts["run"] = json.dumps(values)
    del texts["sha256"]
    file.write_bytes(safetensors.numpy.save(tensors, {**texts, "sha256": checkpoint.checksum(tensors, texts)}))


MISSING = object()
WEIGHTS, BIAS = np.zeros((25, 6), np.float32), np.zeros(6, np.float32)
HISTORY = np.array([[2.3, 0.1, np.nan, 0.5], [2.2, 0.2, 0.25, 0.5]])


def altered(array, value):
    array = array.copy()
    array.flat[1] = value
    return array


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers__0__weights": altered(WEIGHTS, np.nan)}, "layers.0.weights is not finite"),
        ({"layers__0__bias": altered(BIAS, -np.inf)}, "layers.0.bias is not finite"),
        ({"layers__0__weights": WEIGHTS.astype(np.float64)}, "its tensors are not those"),
        ({"layers__0__weights": WEIGHTS.view(np.int32)}, "its tensors are not those"),
        ({"layers__0__weights": WEIGHTS.T.copy()}, "its tensors are not those"),
        ({"layers__0__weights": WEIGHTS.ravel()}, "its tensors are not those"),
        ({"layers__0__bias": MISSING}, "its tensors are not those"),
        ({"layers__2__bias": BIAS}, "its tensors are not those"),
        ({"history": HISTORY[:, :3].copy()}, "its tensors are not those"),
        ({"history": altered(HISTORY, 1.5)}, "its history is implausible"),
        ({"history": altered(HISTORY, np.nan)}, "its history is implausible"),
        ({"history": -HISTORY}, "its history is implausible"),
        ({"history": HISTORY * np.inf}, "its history is implausible"),
        ({"epochs_done": 10**15}, "its tensors are not those"),
        ({"layer_sizes": [25, 6, 10**12]}, "its tensors are not those"),
        ({"layer_sizes": [10**15, 6, 10]}, "its tensors are not those"),
        ({"layer_sizes": [25, 7, 10]}, "its layer sizes are not those"),
        ({"layer_sizes": [25, 6, 0]}, "its layer sizes are not those"),
        ({"layer_sizes": [25]}, "its layer sizes are not those"),
        ({"layer_sizes": "25"}, "its layer sizes are not those"),
        ({"layer_sizes": [25, 6, "10"]}, "its layer sizes are not those"),
        ({"hidden": "6"}, "its hidden is not a whole number"),
        ({"hidden": None}, "its hidden is not a whole number"),
        ({"steps": -1}, "its steps is not a whole number"),
        ({"steps": 10**400}, "its steps is not a whole number"),
        ({"correct": 0.5}, "its correct is not a whole number"),
        ({"loss": float("nan")}, "its loss is not a finite number"),
        ({"seconds": float("inf")}, "its seconds is not a finite number"),
        ({"learning_rate": 10**400}, "its learning_rate is not a finite number"),
        ({"learning_rate": True}, "its learning_rate is not a finite number"),
        ({"steps": True}, "its steps is not a whole number"),
        ({"layer_sizes": [25, 6, True]}, "its layer sizes are not those"),
        ({"learning_rate": [0.1]}, "its learning_rate is not a finite number"),
        ({"backend": 4}, "its backend is not a string"),
        ({"rng": {**State.start(0).rng, "bit_generator": "MT19937"}}, "its RNG state is damaged"),
        ({"rng": {**State.start(0).rng, "state": {"state": -1, "inc": 1}}}, "its RNG state is damaged"),
        ({"rng": {**State.start(0).rng, "state": 3}}, "its RNG state is damaged"),
        ({"rng": {}}, "its RNG state is damaged"),
        ({"rng": [1]}, "its RNG state is damaged"),
        ({"rng": {**State.start(0).rng, "more": 1}}, "its RNG state is damaged"),
        ({"loss": MISSING}, "its metadata is incomplete"),
        ({"run": "[" * 50_000}, "its metadata is damaged"),
        ({"run": "[]"}, "its metadata is incomplete"),
        ({"run": "no JSON"}, "its metadata is damaged"),
        ({"format": "vectorization-study checkpoint 3"}, "its format is not"),
    ],
)
def test_a_forged_checkpoint_is_refused(file, changes, message):
    forged(file, **changes)
    assert_refused(file, message)


def test_an_unchanged_forgery_is_accepted(file):
    before = load(file)
    forged(file)
    assert_same(load(file), before)


def assert_refused(file, message):
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            load(file)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def header(shape, end):
    """The beginning of a file with one tensor."""
    text = json.dumps({"history": {"dtype": "F64", "shape": shape, "data_offsets": [0, end]}}).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or not a checkpoint"),
        (b"Accuracy 92 %\n" * 10, "damaged or not a checkpoint"),
        (pickle.dumps({"layers": [1, 2, 3]}), "damaged or not a checkpoint"),
        (b"\xff" * 1000, "damaged or not a checkpoint"),
        (header([2**40, 4], 2**45), "damaged or not a checkpoint"),
        (header([2**62, 4], 2**64 - 1), "damaged or not a checkpoint"),
        (header([1, 1], 8) + bytes(8), "damaged or not a checkpoint"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    assert_refused(tmp_path / "file", message)


def test_a_truncated_or_extended_file_is_refused(file):
    content = file.read_bytes()
    for length in [*range(0, len(content), 97), len(content) - 1]:
        file.write_bytes(content[:length])
        assert_refused(file, "damaged or not a checkpoint")
    file.write_bytes(content + b"\0")
    assert_refused(file, "damaged or not a checkpoint")


def test_every_flipped_bit_is_detected(file):
    """In the parameters, too, where any value is valid: without the checksum, the run would silently diverge."""
    content = bytearray(file.read_bytes())
    for position in [*range(0, 8), *range(8, len(content), 13)]:
        content[position] ^= 1 << position % 8
        file.write_bytes(content)
        with pytest.raises(CheckpointError):
            load(file)
        content[position] ^= 1 << position % 8


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "no such file"),
        (".", "no such file"),
        ("a\0b", "no such file"),
        ("a" * 300, "too long"),
    ],
)
def test_a_missing_file_is_refused(tmp_path, name, message):
    assert_refused(tmp_path / name, message)


def test_a_file_of_terabytes_is_refused_unread(file):
    os.truncate(file, 2**42)
    assert_refused(file, "larger than the limit of 268,435,456 bytes")


# The command line


def test_resume(main, tmp_path):
    short, long = tmp_path / "short", tmp_path / "long"
    assert main(*TRAIN, "--epochs", 6, "--checkpoint", long)[0] == 0
    assert main(*TRAIN, "--epochs", 4, "--checkpoint", short, "--threads", 1)[0] == 0
    code, shown, error = main("train", "--resume", short)
    assert (code, error) == (0, f"{short} is finished: all 4 epochs are done; raise --epochs to train further\n")
    assert "checkpoint written" in shown
    assert main("train", "--resume", short, "--epochs", 6, "--threads", 2)[0] == 0
    assert_same(load(short), load(long))
    code, shown, error = main("train", "--resume", short, "--epochs", 5)
    assert (code, shown) == (2, "")
    assert "6 epochs have been started" in error
    assert {path.name for path in tmp_path.iterdir()} == {"short", "long"}


def test_resume_into_another_file(main, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    main(*TRAIN, "--epochs", 1, "--checkpoint", first)
    before = first.read_bytes()
    assert main("train", "--resume", first, "--checkpoint", second, "--epochs", 2)[0] == 0
    assert first.read_bytes() == before
    assert len(load(second).state.history.epochs) == 2


def test_two_runs_do_not_share_a_file(main, trained, tmp_path):
    """Neither a resumed checkpoint, nor a new one, nor a history."""
    file, history, other = tmp_path / "run", tmp_path / "history.json", tmp_path / "other"
    file.write_bytes(trained.read_bytes())
    process = start("train", "--resume", file, "--epochs", 10**6, "--json", history)
    wait_for(tmp_path / ".history.json.lock", process)
    for arguments in (["--checkpoint", other, "--json", history], ["--json", tmp_path / "." / "history.json"]):
        code, shown, error = main(*TRAIN, *arguments)
        assert (code, shown) == (2, "")
        assert error.startswith(f"error: {history} is in use by process {process.pid}: ")
    assert not other.exists()
    code, shown, error = main("train", "--resume", file, "--epochs", 2)
    assert (code, shown) == (2, "")
    assert error.startswith(f"error: {file} is in use by process {process.pid}: wait until it has ended")
    process.kill()
    process.communicate()
    assert main("train", "--resume", file, "--epochs", 10**6 + 1, "--json", history, "--learning-rate", 0)[0] == 2
    assert main("train", "--resume", file, "--epochs", max(1, progress(load(file).state)[0]))[0] == 0
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".lock"] == []


@pytest.mark.parametrize("option", ["--checkpoint", "--resume"])
@pytest.mark.parametrize("name", ["run", "./run", "folder/../run", "link", "hard link", "link to link"])
def test_the_history_does_not_replace_the_checkpoint(main, trained, tmp_path, monkeypatch, option, name):
    monkeypatch.setattr("model.cli.train.load_dataset", lambda *_: pytest.fail("work began"))
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run"
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("run")
    (tmp_path / "link to link").symlink_to("link")
    if option == "--resume" or name == "hard link":
        file.write_bytes(trained.read_bytes())
        (tmp_path / "hard link").hardlink_to(file)
    before = file.exists() and file.read_bytes()
    code, shown, error = main("train", option, "run", "--json", name)
    assert (code, shown) == (2, "")
    assert re.fullmatch(r"error: .*\n", error)
    if option == "--resume" or name != "hard link":  # --checkpoint reports a different error
        assert " is the checkpoint run: choose another file for the history" in error
    assert (file.exists() and file.read_bytes()) == before


def test_only_an_earlier_history_is_replaced(main, tmp_path, monkeypatch):
    file = tmp_path / "history.json"
    assert main(*TRAIN, "--epochs", 1, "--json", file)[0] == 0
    assert main(*TRAIN, "--epochs", 2, "--json", file)[0] == 0
    assert len(json.loads(file.read_text())["history"]) == 2
    monkeypatch.setattr("model.cli.train.load_dataset", lambda *_: pytest.fail("work began"))
    for content in (b"", b"notes", b"[]", b"{}", b'{"runs": {}}', b"[" * 100_000, b"\xff\xfe", b"\0" * 100):
        file.write_bytes(content)
        code, shown, error = main(*TRAIN, "--json", file)
        assert (code, shown) == (2, "")
        message = f"error: {file} exists and is not an earlier report (JSON with 'history'): choose another file"
        assert error.startswith(message), content[:20]
        assert file.read_bytes() == content


def test_a_link_to_the_resumed_checkpoint_is_that_checkpoint(main, trained, tmp_path):
    file, link = tmp_path / "run", tmp_path / "latest"
    file.write_bytes(trained.read_bytes())
    link.symlink_to(file)
    assert main("train", "--resume", file, "--checkpoint", link, "--epochs", 2)[0] == 0
    assert len(load(file).state.history.epochs) == 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    file = tmp_path_factory.mktemp("trained") / "run"
    command = [sys.executable, "-m", "model", *map(str, TRAIN), "--epochs", "1", "--checkpoint", str(file)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return file


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "{file}", "--hidden", 9, "--seed", 1], "hidden 8, not 9; seed 0, not 1"),
        (["--resume", "{file}", "--backend", "sparse"], "backend 'numpy', not 'sparse'"),
        (["--resume", "{file}", "--limit", 400, "--batch-size", 51], "limit 300, not 400; batch_size 50, not 51"),
        (["--resume", "{file}", "--learning-rate", 0.1], "learning_rate 0.3, not 0.1"),
        (["--resume", "{file}", "--eval-every", 2], "eval_every 3, not 2"),
        (["--resume", "/no/such/file"], "there is no such file"),
        (["--resume", "a" * 300], "File name too long; pass a file written by --checkpoint"),
        (["--resume", "README.md"], "README.md: it is damaged or not a checkpoint"),
        (["--checkpoint", "{file}"], "exists: resume it with --resume "),
        (["--checkpoint", "/no/such/folder/x"], "there is no folder /no/such/folder"),
        (["--checkpoint", "/"], "it is a folder"),
        pytest.param(["--checkpoint", "/proc/run"], "cannot write /proc/run", marks=needs_proc),
        (["--json", "a" * 248], "File name too long; choose another file"),  # with the temporary file's ending
        (["--checkpoint", "a" * 248], "File name too long; choose another file"),
        (["--checkpoint-every", 2], "--checkpoint-every needs --checkpoint"),
        (["--checkpoint", "x", "--checkpoint-every", 0], "Invalid value for '--checkpoint-every'"),
    ],
)
def test_errors_come_before_training(main, trained, monkeypatch, arguments, message):
    monkeypatch.setattr("model.training.descend", lambda *_: pytest.fail("training began"))
    before = trained.read_bytes()
    dataset = [] if "--resume" in arguments else ["--dataset", "digits28"]
    code, shown, error = main("train", *dataset, *(str(argument).format(file=trained) for argument in arguments))
    assert (code, shown) == (2, "")
    assert re.fullmatch(r"error: .*\n", error)
    assert message in error
    assert trained.read_bytes() == before


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC])
def test_an_unwritable_folder_is_an_error_before_training(main, tmp_path, monkeypatch, number):
    """Simulated: nothing is read-only for root, who may run this."""

    def fail(**options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("tempfile.NamedTemporaryFile", fail)
    code, shown, error = main(*TRAIN, "--checkpoint", tmp_path / "run")
    assert (code, shown) == (2, "")
    file, reason = tmp_path / "run", os.strerror(number)
    assert error == f"error: cannot write {file}: {reason} in {tmp_path}; choose another folder\n"
    assert not list(tmp_path.iterdir())


def test_changed_images_count_as_another_run(main, trained, monkeypatch):
    dataset = command_line.load_dataset("digits28")
    images = dataset.test_images.copy()
    images[-1, -1] ^= 1
    monkeypatch.setattr(command_line, "load_dataset", lambda name, folder: dataset._replace(test_images=images))
    code, _, error = main("train", "--resume", trained, "--epochs", 2)
    assert code == 2
    assert "data_sha256" in error


def test_a_checkpoint_does_not_choose_what_is_imported(main, trained, tmp_path):
    file = tmp_path / "run"
    file.write_bytes(trained.read_bytes())
    forged(file, backend="this:Zen")
    code, shown, error = main("train", "--resume", file, "--epochs", 2)
    assert (code, shown) == (2, "")
    assert "add --backend 'this:Zen'" in error
    assert "this" not in sys.modules


def test_a_custom_backend_can_be_resumed(main, tmp_path):
    own = ["--backend", "kernels.numpy_backend:NumpyBackend"]
    assert main(*TRAIN, *own, "--epochs", 1, "--checkpoint", tmp_path / "run")[0] == 0
    assert main("train", *own, "--resume", tmp_path / "run", "--epochs", 2)[0] == 0


def test_save_schedule(main, monkeypatch, tmp_path):
    saved = []
    monkeypatch.setattr(command_line, "save", lambda _, __, state, ___: saved.append(progress(state)))
    main(*TRAIN, "--epochs", 5, "--checkpoint", tmp_path / "x")
    assert saved == [(0, 0), (5, 0)]
    saved.clear()
    main(*TRAIN, "--epochs", 5, "--checkpoint", tmp_path / "x", "--checkpoint-every", 2)
    assert saved == [(0, 0), (2, 0), (4, 0), (5, 0)]
    saved.clear()
    monkeypatch.setattr(command_line, "SAVE_SECONDS", 0)
    main(*TRAIN, "--epochs", 1, "--checkpoint", tmp_path / "x")
    assert saved == [*((0, step) for step in range(7)), (1, 0)]


def test_overflowed_parameters_are_not_reported_as_a_damaged_checkpoint(main, tmp_path):
    file = tmp_path / "run"
    options = ["--checkpoint", file, "--checkpoint-every", 1, "--epochs", 3, "--learning-rate", 3e40]
    code, _, error = main(*TRAIN[:-4], "--eval-every", 3, *options)
    assert code == 2
    assert re.fullmatch(r"error: .*with learning rate 3e\+40: try a smaller learning rate\n", error)
    assert progress(load(file).state) == (0, 0)


# Kills


@needs_posix
@pytest.mark.slow
def test_ten_kills():
    cases = [kills.Case("numpy", None), kills.Case("numpy", 7)]
    counts = kills.run(cases, 10, seed=0)
    assert counts["kills"] == 10
    assert counts["runs compared"] >= 2
