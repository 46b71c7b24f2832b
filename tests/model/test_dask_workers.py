"""Training on Dask: a scheduler and workers in separate processes that die at the worst moments."""

import contextlib
import functools
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time

import dask
import numpy as np
import pytest
from distributed import Client

from kernels import backend_names, get_backend
from kernels.numpy_backend import NumpyBackend
from model.data import limited, load_idx, sha256
from model.extras import dask_workers
from model.extras.checkpoint import load
from model.extras.dask_workers import Cluster, ClusterError, add_subtrees, deal, merge, subtrees
from model.mlp import MLP
from model.shards import Sums, add_in_tree
from model.training import train
from tests.support.idx import write_idx
from tests.support.runs import assert_same, run_model
from tests.support.systems import needs_posix, needs_proc

DIGITS = ("--dataset", "digits28", "--limit", 2000, "--hidden", 16)


class Processes:
    """A scheduler and workers, which can be killed."""

    def __init__(self, folder, scheduler=None):
        self.file = folder / "scheduler.json"
        self.workers = []
        ports = ("--host", "127.0.0.1", "--port", "0", "--dashboard-address", ":0")
        self.scheduler = self._start("dask_scheduler", *ports, program=scheduler)
        self.client = Client(scheduler_file=str(self.file), timeout=30)
        self.address = self.client.scheduler.address

    def _start(self, command, *options, program=None):
        program = program or ["-m", f"distributed.cli.{command}"]
        line = [sys.executable, *program, "--scheduler-file", str(self.file), *options]
        return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def start_worker(self, threads=1, program=None, nanny="--no-nanny"):
        options = (nanny, "--no-dashboard", "--nthreads", str(threads))
        self.workers.append(self._start("dask_worker", *options, program=program))

    def have(self, count):
        """Start or kill workers until the scheduler has `count` of them."""
        while len(self.workers) < count:
            self.start_worker()
        while len(self.workers) > count:
            self.kill_worker(0)
        while len(self.client.nthreads()) != count:
            time.sleep(0.02)

    def kill_worker(self, index):
        worker = self.workers.pop(index)
        worker.kill()
        worker.wait()

    def end(self):
        with contextlib.suppress(Exception):
            self.client.close(timeout=1)
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """A cluster shared by all tests that leave its scheduler alive."""
    started = Processes(tmp_path_factory.mktemp("cluster"))
    yield started
    started.end()


@pytest.fixture
def mortal(tmp_path):
    """A cluster for one test, with a worker that has imported the project, which takes seconds on a busy machine."""
    started = Processes(tmp_path)
    started.have(1)
    Cluster(started.client)
    yield started
    started.end()


def trained(backend, dataset, layer_sizes=(784, 16, 10), dtype=np.float32, **options):
    mlp = MLP(layer_sizes, dtype=dtype)
    history = train(mlp, backend, dataset, **{"epochs": 2, **options})
    return mlp.parameters, [epoch._replace(seconds=0) for epoch in history.epochs]


def assert_equal(ours, theirs):
    assert [parameter.tobytes() for parameter in ours[0]] == [parameter.tobytes() for parameter in theirs[0]]
    assert ours[1] == theirs[1]


# The tree of sums


def sums_of(values, first, last):
    """The sums of some shards, made of the rows of an array."""
    return (Sums(float(value[0]), index, [value.copy()]) for index, value in enumerate(values[first:last], first))


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 32])
def test_subtrees_give_the_bits_of_the_whole_tree(count):
    """Floats of all magnitudes, whose sum depends on the order of additions, split in all ways over up to 3 workers."""
    rng = np.random.default_rng(count)
    values = rng.normal(size=(count, 50)) * 10.0 ** rng.integers(-8, 8, (count, 50))

    expected = add_in_tree(sums_of(values, 0, count))
    for bounds in itertools.combinations_with_replacement(range(count + 1), 2):
        nodes = {}
        for first, last in itertools.pairwise((0, *bounds, count)):
            held = subtrees(first, last, (0, count))
            assert [shard for node in held for shard in range(*node)] == list(range(first, last))
            nodes |= {node: add_in_tree(sums_of(values, *node)) for node in held}
        found = add_subtrees(nodes, (0, count))
        assert (found.loss, found.correct) == (expected.loss, expected.correct)
        np.testing.assert_array_equal(found.gradient[0], expected.gradient[0])
        assert not nodes


@pytest.mark.parametrize("workers", [1, 2, 4, 8, 16, 32])
def test_powers_of_two_send_one_sum_each(workers):
    share = 32 // workers
    assert all(len(subtrees(n * share, (n + 1) * share, (0, 32))) == 1 for n in range(workers))


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 16])
def test_merged_parts_give_the_bits_of_the_whole_tree(workers):
    """With a fan-in of three, and twice: when a worker dies, others repeat a task with the same arguments."""
    rng = np.random.default_rng(workers)
    values = rng.normal(size=(32, 50)) * 10.0 ** rng.integers(-8, 8, (32, 50))

    expected = add_in_tree(sums_of(values, 0, 32))
    dealt = deal(32, dict.fromkeys(map(str, range(workers)), 2)).values()
    parts = [{node: add_in_tree(sums_of(values, *node)) for node in subtrees(*part, (0, 32))} for part in dealt]
    while len(parts) > 1:
        groups = [parts[first : first + 3] for first in range(0, len(parts), 3)]
        parts, again = ([merge(32, *group) for group in groups] for _ in range(2))
        assert [part.keys() for part in parts] == [part.keys() for part in again]
        for part, other in zip(parts, again):
            for node, found in part.items():
                np.testing.assert_array_equal(found.gradient[0], other[node].gradient[0])
    ((node, found),) = parts[0].items()
    assert (node, found.loss, found.correct) == ((0, 32), expected.loss, expected.correct)
    np.testing.assert_array_equal(found.gradient[0], expected.gradient[0])


# Equal bits


@pytest.fixture(scope="module")
def alone(tiny):
    """Runs of this process, by backend and dtype."""

    @functools.cache
    def run(name, dtype):
        return trained(get_backend(name), limited(tiny, 2100), (25, 6, 10), dtype, threads=2)

    return run


@pytest.mark.slow
def test_same_bits_on_many_workers(processes, tiny):
    """More workers than FAN_IN, and counts that do not divide 32."""
    many = tiny._replace(train_images=np.tile(tiny.train_images, (8, 1)), train_labels=np.tile(tiny.train_labels, 8))
    expected = trained(NumpyBackend(), many, (25, 6, 10))
    for workers in (7, 16, 9):
        processes.have(workers)
        batches = Cluster(processes.client).batch
        assert_equal(trained(NumpyBackend(), many, (25, 6, 10), batches=batches), expected)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3, 5])
def test_any_number_of_workers_gives_the_bits_of_one_process(processes, alone, tiny, workers, monkeypatch, request):
    """Of the four shards of 2,100 images, a worker gets all, one or two, or none. Pairs of sums make a deeper tree."""
    monkeypatch.setattr(dask_workers, "FAN_IN", 2)
    processes.have(workers)
    batches = Cluster(processes.client).batch
    for name in request.config.getoption("--backend") or backend_names():  # all of them, as workers start slowly
        for dtype in (np.float32, np.float64):
            ours = trained(get_backend(name), limited(tiny, 2100), (25, 6, 10), dtype, batches=batches)
            assert_equal(ours, alone(name, dtype))


@pytest.mark.slow
def test_workers_give_the_bits_of_one_process_on_whole_data(processes, full_batch_backend, digits28, tmp_path):
    """From files, on three workers, whose ranges of the 64 shards (on sparse 32) are several subtrees each."""
    processes.have(3)
    batches = Cluster(processes.client).batch
    write_idx(tmp_path, digits28)
    seen = []
    ours = trained(full_batch_backend, load_idx(tmp_path), (784, 128, 10), batches=batches, on_images=seen.append)
    assert_equal(ours, trained(full_batch_backend, digits28, (784, 128, 10)))
    assert sum(seen) == 2 * 60_000


def test_workers_with_more_threads_get_more_shards(processes, tiny):
    processes.have(1)
    processes.start_worker(threads=3)
    while len(processes.client.nthreads()) < 2:
        time.sleep(0.02)
    parts = Cluster(processes.client).batch(
        NumpyBackend(), tiny.train_images, tiny.train_labels, np.dtype(np.float32), dask_workers.Memory()
    )
    threads = processes.client.nthreads()
    shares = {threads[worker]: last - first for (first, last), (worker, _) in parts.parts.items()}
    assert shares == {1: 1, 3: 3}
    processes.kill_worker(1)
    processes.have(1)


@pytest.mark.parametrize("limit", [None, 0, 3_000_000])
def test_workers_map_files_and_keep_no_more_than_the_limit(processes, tmp_path, digits28, limit):
    processes.have(2)
    few = limited(digits28, 3_000)
    write_idx(tmp_path, few)
    mapped = limited(load_idx(tmp_path), 2_900)
    seen = []

    def look(state):
        seen.extend(processes.client.run(kept, limit).values())

    batches = Cluster(processes.client).batch
    ours = trained(NumpyBackend(), mapped, memory_limit=limit, batches=batches, on_step=look)
    assert_equal(ours, trained(NumpyBackend(), limited(few, 2_900)))
    assert len(seen) >= 4
    assert all(seen) if limit != 0 else not any(seen)
    assert limit is None or all(size <= limit for size in seen)


def kept(limit, dask_worker):
    """Bytes of prepared images in a worker's parts; those of an earlier run, with another limit, may still be there."""
    parts = (value for value in dask_worker.data.values() if isinstance(value, dask_workers.Part))
    return sum(part.__sizeof__() for part in parts if part.memory_limit == limit)


# What goes wrong


@pytest.mark.slow
def test_killed_workers_change_no_bit(processes, digits28):
    """Ten times, kill -9 a worker at a random moment and start a new one; up to two are missing at a time."""
    processes.have(3)
    dataset, rng = limited(digits28, 20_000), random.Random(0)
    spent = threading.Event()
    epochs = 0

    def kill():
        for kills in range(10):
            time.sleep(rng.uniform(0, 1))
            while epochs < kills + 2:  # a busy machine may not get as far in a second
                time.sleep(0.02)
            processes.kill_worker(rng.randrange(len(processes.workers)))
            processes.start_worker()
        spent.set()

    mlp, reached = MLP((784, 64, 10)), []

    def on_step(state):
        nonlocal epochs
        epochs = len(state.history.epochs)
        if spent.is_set() and state.steps == 0:
            reached.append(len(state.history.epochs))
            raise InterruptedError

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    batches = Cluster(processes.client, timeout=5).batch
    with pytest.raises(InterruptedError):
        train(mlp, NumpyBackend(), dataset, epochs=10_000, batches=batches, on_step=on_step)
    killer.join()
    expected, _ = trained(NumpyBackend(), dataset, (784, 64, 10), epochs=reached[0])
    assert reached[0] > 10
    assert [ours.tobytes() for ours in mlp.parameters] == [theirs.tobytes() for theirs in expected]


@pytest.mark.slow
@needs_posix
def test_workers_killed_in_the_middle_of_a_reduction(mortal, tiny, tmp_path, monkeypatch):
    """Four workers, whose sums are added in pairs: each task that adds sums kills its worker when it is first tried."""
    monkeypatch.setattr(dask_workers, "FAN_IN", 2)
    monkeypatch.setattr(dask_workers, "merge", functools.partial(merge_or_die, tmp_path))
    mortal.have(4)
    ours = trained(NumpyBackend(), tiny, (25, 6, 10), epochs=1, batches=Cluster(mortal.client).batch)
    assert sorted(file.name for file in tmp_path.glob("*-*")) == ["0-2", "0-4", "2-4"]
    assert len(mortal.client.nthreads()) == 1
    assert_equal(ours, trained(NumpyBackend(), tiny, (25, 6, 10), epochs=1))


def merge_or_die(folder, shards, *parts):
    """What `merge` returns; but kill -9 the worker if these shards have not been tried before."""
    numbers = {number for part in parts for node in part for number in node}
    try:
        (folder / f"{min(numbers)}-{max(numbers)}").touch(exist_ok=False)
    except FileExistsError:
        return merge(shards, *parts)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_the_last_worker_is_replaced(mortal, tiny):
    """Dask alone would leave its tasks waiting."""

    def on_images(count):
        if len(mortal.workers) == 1:
            mortal.start_worker()
            mortal.kill_worker(0)
            mortal.workers.append(None)

    cluster = Cluster(mortal.client)
    ours = trained(NumpyBackend(), tiny, (25, 6, 10), batches=cluster.batch, on_images=on_images)
    mortal.workers.pop()
    assert_equal(ours, trained(NumpyBackend(), tiny, (25, 6, 10)))


@pytest.mark.slow
def test_all_workers_gone(mortal, tiny):
    def on_step(state):
        if len(state.history.epochs) == 2 and mortal.workers:
            mortal.kill_worker(0)

    cluster = Cluster(mortal.client, timeout=1)
    with pytest.raises(ClusterError, match=r"no worker for 1 seconds: start one with: dask worker tcp://127"):
        trained(NumpyBackend(), tiny, (25, 6, 10), epochs=9, batches=cluster.batch, on_step=on_step)


@pytest.mark.slow
@needs_posix
def test_all_workers_gone_during_a_step(mortal, tiny):
    """The kernel kills its worker, and every worker that retries it; Dask gives up before all are dead."""
    batches = Cluster(mortal.client, timeout=1).batch
    with pytest.raises(ClusterError, match="no worker for 1 seconds"):
        trained(Deadly(), tiny, (25, 6, 10), batches=batches)


@needs_posix
@pytest.mark.slow
@pytest.mark.parametrize("nannies", [1, 2])
def test_a_task_that_kills_every_worker(mortal, tiny, nannies, monkeypatch):
    """A nanny restarts its worker, which would repeat forever: with one worker, or with two."""
    if nannies == 1:
        monkeypatch.setattr(dask_workers, "ALLOWED_FAILURES", 1)  # of all workers, which takes seconds each time
    for _ in range(nannies):
        mortal.start_worker(nanny="--nanny")
    mortal.kill_worker(0)
    while len(mortal.client.nthreads()) < nannies:
        time.sleep(0.02)
    with pytest.raises(ClusterError, match="one worker after another died on the same task, perhaps out of memory"):
        trained(Deadly(), tiny, (25, 6, 10), batches=Cluster(mortal.client).batch)
    for nanny in mortal.workers:
        nanny.terminate()  # its worker with it
        nanny.wait()


@pytest.mark.slow
def test_a_scheduler_without_the_project(tmp_path):
    program = "import sys; sys.modules['model'] = None; from distributed.cli.dask_scheduler import main; main()"
    processes = Processes(tmp_path, scheduler=["-c", program])
    try:
        processes.have(1)
        with pytest.raises(ClusterError, match="the scheduler cannot import this project: scheduler and workers need"):
            Cluster(processes.client)
    finally:
        processes.end()


@pytest.mark.slow
def test_a_worker_without_the_project(mortal):
    program = "import sys; sys.modules['model'] = None; from distributed.cli.dask_worker import main; main()"
    mortal.start_worker(program=["-c", program])
    while len(mortal.client.nthreads()) < 2:
        time.sleep(0.02)
    mortal.kill_worker(0)
    with pytest.raises(ClusterError, match="no worker answers for 2 seconds: scheduler and workers need"):
        Cluster(mortal.client, timeout=2)


class Deadly(NumpyBackend):
    """Kills its worker."""

    def _relu(self, z):
        os.kill(os.getpid(), signal.SIGKILL)


class Broken(NumpyBackend):
    """Does not work."""

    def _relu(self, z):
        raise RuntimeError("broken kernel")


def test_an_error_in_a_worker_reaches_the_caller(processes, tiny):
    processes.have(2)
    with pytest.raises(RuntimeError, match="broken kernel"):
        trained(Broken(), tiny, (25, 6, 10), batches=Cluster(processes.client).batch)


@pytest.mark.slow
def test_the_checkpoint_survives_the_scheduler(mortal, tmp_path):
    """A single process resumes it, and ends with the bits of a run that never used a cluster."""
    file, whole = tmp_path / "run", tmp_path / "whole"
    options = ("--epochs", 400, "--eval-every", 400, "--checkpoint-every", 1, "--checkpoint")
    command = [sys.executable, "-m", "model", "train", *DIGITS, *options, file, "--scheduler", mortal.address]
    short = {**os.environ, "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "1s"}
    process = subprocess.Popen(map(str, command), stderr=subprocess.PIPE, text=True, env=short)
    while not (file.exists() and load(file).state.history.epochs):
        time.sleep(0.02)
        assert process.poll() is None, process.stderr.read()
    mortal.scheduler.kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "Traceback" not in errors
    assert re.search(rf"^error: the scheduler at {mortal.address} is gone", errors, re.MULTILINE), errors
    assert 0 < len(load(file).state.history.epochs) < 400
    assert run_model("train", "--resume", file, *DIGITS[:2]).returncode == 0
    assert run_model("train", *DIGITS, *options, whole).returncode == 0
    assert_same(load(file), load(whole))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("numpy", "1.0", r"numpy 1\.0, not 2\.\S+"), ("processor", "6502", r"processor (6502, not .*|.*, not 6502)")],
)
def test_a_worker_that_would_compute_different_bits(mortal, tiny, name, value, message):
    program = (
        "from distributed.cli.dask_worker import main; from model.extras import dask_workers;"
        f"found = dask_workers.fingerprint() | {{'{name}': '{value}'}};"
        "dask_workers.fingerprint = lambda: found; main()"
    )
    mortal.start_worker(program=["-c", program])
    while len(mortal.client.nthreads()) < 2:
        time.sleep(0.02)
    message = rf"worker tcp://\S+ would compute different bits: {message}: scheduler and workers need"
    with pytest.raises(ClusterError, match=message):
        trained(NumpyBackend(), tiny, (25, 6, 10), batches=Cluster(mortal.client).batch)


def test_a_scheduler_of_another_version(processes, monkeypatch):
    processes.have(1)
    versions = {"scheduler": {"packages": {"distributed": "1.0"}}}
    monkeypatch.setattr(Client, "get_versions", lambda client: versions)
    with pytest.raises(ClusterError, match=r"the scheduler has distributed 1\.0, not 20"):
        Cluster(processes.client)


def test_a_file_that_workers_lack_or_that_differs(processes, tmp_path, digits28, monkeypatch):
    processes.have(1)
    write_idx(tmp_path, limited(digits28, 600))
    mapped, cluster = load_idx(tmp_path), Cluster(processes.client)
    with monkeypatch.context() as patch:
        patch.setattr(dask_workers, "shard_digest", lambda array: bytes(32))
        with pytest.raises(ClusterError, match=r"idx3-ubyte of a worker differs from the client's"):
            trained(NumpyBackend(), mapped, batches=cluster.batch)
        patch.setattr(Cluster, "digests", lambda cluster, array, ranges: bytes(32))
        with pytest.raises(ClusterError, match=r"idx3-ubyte of worker tcp://\S+ differs from that of other workers"):
            trained(NumpyBackend(), mapped, batches=cluster.batch)
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(ClusterError, match=r"cannot read .*idx3-ubyte .*: put the files where all workers find them"):
        trained(NumpyBackend(), mapped, batches=cluster.batch)


@pytest.mark.slow
@needs_posix
def test_a_truncated_file_is_a_one_line_error(processes, tmp_path, digits28):
    """It ends the worker's process, or this one if it reads the file itself; limit 0 makes it read the pages again."""
    write_idx(tmp_path, limited(digits28, 20_000))
    file = tmp_path / "train-images-idx3-ubyte"
    whole = file.read_bytes()
    options = ("--dataset", "idx", "--data", tmp_path, "--epochs", 100_000, "--hidden", 16, "--memory-limit", 0)
    processes.have(2)
    for place in ((), ("--scheduler", processes.address)):
        file.write_bytes(whole)
        saved = tmp_path / f"run{len(place)}"
        command = [
            sys.executable,
            "-m",
            "model",
            "train",
            *options,
            "--checkpoint-every",
            1,
            "--checkpoint",
            saved,
            *place,
        ]
        process = subprocess.Popen(map(str, command), stderr=subprocess.PIPE, text=True)
        while not (saved.exists() and load(saved).state.history.epochs):
            time.sleep(0.02)
            assert process.poll() is None, process.stderr.read()
        os.truncate(file, 100_000)
        if place:  # all workers that read it may have died: one more reports the file
            processes.start_worker()
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2
        assert errors.count("error:") == 1
        assert str(file) in errors.replace("\n", "")
        assert "Traceback" not in errors
    for worker in processes.workers:
        assert worker.poll() in (None, 2)
    processes.workers = [worker for worker in processes.workers if worker.poll() is None]
    processes.have(2)


def test_checkpoints_of_workers_and_of_one_process_identify_the_same_data(processes, tmp_path, digits28):
    processes.have(2)
    write_idx(tmp_path, limited(digits28, 9_000))
    mapped = load_idx(tmp_path)
    assert sha256(mapped, Cluster(processes.client).digests) == sha256(mapped)


def test_mini_batches_are_refused(processes, tiny):
    processes.have(1)
    with pytest.raises(ValueError, match="mini-batches take longer to send than to compute"):
        trained(NumpyBackend(), tiny, (25, 6, 10), batch_size=8, batches=Cluster(processes.client).batch)


# The command line


@pytest.mark.slow
def test_local_workers(tmp_path):
    files = tmp_path / "alone", tmp_path / "workers"
    for file, options in zip(files, ((), ("--workers", 2, "--memory-limit", "1 MB"))):
        result = run_model("train", *DIGITS, "--epochs", 3, "--checkpoint", file, *options)
        assert result.returncode == 0, result.stderr
    assert re.match(r"dashboard: http://\S+:\d+/status\n", result.stderr)
    assert_same(*map(load, files))


@pytest.mark.slow
@needs_posix
def test_interrupt_leaves_the_step_to_the_workers(tmp_path):
    """Ctrl-C reaches them, too."""
    file = tmp_path / "run"
    options = ("--epochs", 100_000, "--checkpoint-every", 1, "--checkpoint", file, "--workers", 2)
    command = [sys.executable, "-m", "model", "train", *DIGITS, *options]
    process = subprocess.Popen(map(str, command), stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (file.exists() and load(file).state.history.epochs):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert f"saved in {file}: continue with --resume {file}" in errors.replace("\n", "")
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scheduler", "tcp://127.0.0.1:1"], "no scheduler answers at tcp://127.0.0.1:1"),
        (["--scheduler", "nonsense://x"], "no scheduler answers at nonsense://x"),
        (["--scheduler", "tcp://127.0.0.1:1", "--workers", "2"], "use either --workers or --scheduler"),
        (["--workers", "0"], "Invalid value for '--workers'"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(main, arguments, message):
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        code, _, error = main("train", *DIGITS, *arguments)
    assert code == 2
    assert re.fullmatch(r"error: .*\n", error), error
    assert message in error


@pytest.mark.parametrize("place", [("--workers", 2), ("--scheduler", "tcp://127.0.0.1:1")])
def test_mini_batches_are_refused_before_a_cluster_is_started(main, monkeypatch, place):
    monkeypatch.setattr(dask_workers, "connect", lambda *_: pytest.fail("connected"))
    message = "mini-batches take longer to send than to compute: leave out --batch-size, or the workers"
    assert main("train", *DIGITS, *place, "--batch-size", 10) == (2, "", f"error: {message}\n")


def test_without_dask():
    program = "import sys; sys.modules['distributed'] = None; from model.cli import main; main()"
    command = [sys.executable, "-c", program, "train", *map(str, DIGITS), "--workers", "2"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"error: .* needs Dask; install it with: pip install -e '\.\[distributed\]'\n", result.stderr)


@needs_proc
@pytest.mark.slow
def test_data_larger_than_the_memory_limit(tmp_path, digits28):
    """480,000 images in less than 1 GB of memory, including the pages of the mapped files."""
    images = np.concatenate([np.roll(digits28.train_images, shift, axis=1) for shift in range(8)])  # all different
    large = digits28._replace(train_images=images, train_labels=np.tile(digits28.train_labels, 8))
    write_idx(tmp_path, large)
    options = ("--dataset", "idx", "--data", tmp_path, "--epochs", 2, "--hidden", 128, "--checkpoint", tmp_path / "run")
    program = (
        "import atexit, sys; from pathlib import Path; from model.cli import main;"
        "atexit.register(lambda: print(Path('/proc/self/status').read_text())); main()"
    )
    command = [sys.executable, "-c", program, "train", *options, "--memory-limit", "200 MB"]
    result = subprocess.run(map(str, command), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", result.stdout)[1])
    assert 376e6 < peak < 1e9
    found = load(tmp_path / "run")
    epochs = [epoch._replace(seconds=0) for epoch in found.state.history.epochs]
    assert_equal((found.mlp.parameters, epochs), trained(get_backend("numpy"), large, (784, 128, 10)))
