"""The training loop: equal bits on any number of threads, equal trajectories on every backend, clear errors."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from scipy.sparse import csr_array
from threadpoolctl import threadpool_info, threadpool_limits

from kernels import get_backend
from kernels.numpy_backend import NumpyBackend
from model.data import limited
from model.mlp import MLP
from model.shards import SHARD, Memory, Shards, shard_ranges
from model.threads import thread_pool
from model.training import Epoch, History, TrainingError, train

SMALL = (25, 6, 10)


def trained(backend, dataset, layer_sizes=SMALL, dtype=np.float32, **options):
    mlp = MLP(layer_sizes, dtype=dtype)
    history = train(mlp, backend, dataset, **{"epochs": 2, **options})
    return mlp.parameters, history


def results(history):
    return [epoch._replace(seconds=0) for epoch in history.epochs]


@pytest.mark.parametrize("batch_size", [None, 1100, 7])
def test_same_bits_on_any_number_of_threads(backend, tiny, batch_size):
    """Four shards, two, or one; pure Python runs once per thread count."""
    few = limited(tiny, 100 if batch_size == 7 else 2100)
    parameters, history = trained(backend, few, threads=1, batch_size=batch_size)
    for threads in (2, 3, 8) if backend.too_slow_for_full_batches else (1, 2, 3, 8, 2, 3, 8):
        others, other_history = trained(backend, few, threads=threads, batch_size=batch_size)
        for ours, theirs in zip(parameters, others):
            np.testing.assert_array_equal(ours, theirs, strict=True)
        assert results(history) == results(other_history)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [None, 2000])
def test_same_bits_on_any_number_of_threads_over_the_full_data_set(full_batch_backend, digits28, batch_size):
    options = {"epochs": 2 if batch_size is None else 1, "batch_size": batch_size}
    runs = [
        trained(full_batch_backend, digits28, (784, 128, 10), threads=threads, **options)[0]
        for threads in (1, 2, 3, 8, 2)
    ]
    for parameters in runs[1:]:
        for ours, theirs in zip(runs[0], parameters):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("batch_size", [None, 8])
def test_every_backend_takes_the_same_ten_steps(backend, digits28, batch_size):
    """Ten steps in float64 on real images, from the same start, over the same batches.

    A step adds some hundred roundings to parameters of size 0.02 (u is 1.1e-16), and ten steps at this rate do not
    amplify them tenfold: 1e-14 is a bound, while a wrong term, a stale buffer or a swapped batch moves them by 1e-4.
    """
    dataset = digits28._replace(train_images=digits28.train_images[:80:2], train_labels=digits28.train_labels[:80:2])
    dataset = dataset._replace(test_images=digits28.test_images[:5], test_labels=digits28.test_labels[:5])

    def trajectory(kernels):
        mlp, steps = MLP((784, 16, 10), dtype=np.float64), []
        train(
            mlp,
            kernels,
            dataset,
            epochs=10 if batch_size is None else 2,
            batch_size=batch_size,
            on_images=lambda _: steps.append([parameter.copy() for parameter in mlp.parameters]),
        )
        return [*steps, mlp.parameters]

    expected_steps, steps = trajectory(get_backend("numpy")), trajectory(backend)
    assert len(expected_steps) == len(steps) == 11
    for expected, actual in zip(expected_steps, steps):
        for theirs, ours in zip(expected, actual):
            assert ours.dtype == np.float64
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-14)


@pytest.mark.slow
def test_a_long_run_keeps_memory_flat_and_backends_together():
    """In a fresh process, whose memory no other test has grown; the full program takes minutes."""
    command = [sys.executable, "-m", "tests.soak.long_run", "--images", "500", "--hidden", "16"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("after 2000") == 6


def test_every_backend_learns(backend, tiny):
    _, history = trained(backend, tiny, epochs=5, batch_size=20, learning_rate=0.1)
    assert history.epochs[-1].test_accuracy > 0.95
    assert history.epochs[-1].loss < history.epochs[0].loss
    assert all(epoch.seconds > 0 for epoch in history.epochs)


def test_full_batch_equals_one_mini_batch_of_all_images(tiny):
    """The order of additions differs: float32 rounding of sums over 2,600 images."""
    whole, _ = trained(NumpyBackend(), tiny)
    shuffled, _ = trained(NumpyBackend(), tiny, batch_size=2600)
    for ours, theirs in zip(whole, shuffled):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_the_history_holds_every_epoch(tiny):
    seen, progress = [], []
    _, history = trained(
        NumpyBackend(),
        tiny,
        epochs=5,
        eval_every=2,
        batch_size=1000,
        on_images=seen.append,
        on_step=lambda state: progress.append((len(state.history.epochs), state.steps)),
    )
    assert progress == [(epoch, step) for epoch in range(5) for step in range(4)] + [(5, 0)]
    assert [epoch.epoch for epoch in history.epochs] == [1, 2, 3, 4, 5]
    assert [epoch.test_accuracy is not None for epoch in history.epochs] == [False, True, False, True, True]
    assert sum(seen) == 5 * 2600


def test_train_accuracy_is_measured_before_the_update(tiny):
    mlp = MLP(SMALL)
    before = mlp.predict(NumpyBackend(), tiny.train_images)
    (epoch,) = train(mlp, NumpyBackend(), tiny, epochs=1).epochs
    assert epoch.train_accuracy == np.mean(before == tiny.train_labels)
    assert epoch.test_accuracy == np.mean(mlp.predict(NumpyBackend(), tiny.test_images) == tiny.test_labels)


def test_shuffling_depends_on_the_seed(tiny):
    runs = [trained(NumpyBackend(), tiny, batch_size=100, seed=seed)[0] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    assert not np.array_equal(runs[0][0], runs[2][0])


@pytest.mark.parametrize(
    ("most", "numbers"),
    [
        (500, {1: 1, 500: 1, 501: 2, 2000: 4, 60_000: 128}),
        (SHARD, {1: 1, 2: 1, 1024: 1, 1025: 2, 2049: 4, 10_000: 16, 60_000: 64, 65_537: 128, 10**6: 1024}),
        (2048, {1024: 1, 1025: 2, 10_000: 16, 32_768: 32, 60_000: 32, 65_537: 64, 10**6: 512}),
    ],
)
def test_shards_cover_everything_once_and_evenly(most, numbers):
    for count, expected in numbers.items():
        shards = shard_ranges(count, most)
        assert [index for shard in shards for index in range(count)[shard]] == list(range(count))
        assert len(shards) == expected
        sizes = [shard.stop - shard.start for shard in shards]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= most


def test_a_backend_has_shards_of_its_own_size():
    images = np.zeros((40_000, 1), np.uint8)
    for name, expected in (("numpy", 64), ("sparse", 32)):
        assert len(Shards(map, get_backend(name), images, images[:, 0], np.dtype(np.float32)).shards) == expected


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("items", [0, 1, 2, 30])
def test_threads_share_the_work_and_results_come_in_order(threads, items):
    workers = set()
    meeting = threading.Barrier(min(threads, max(items, 1)))

    def work(item):
        if item < threads:
            meeting.wait(60)  # each thread has one of the first items
        workers.add(threading.get_ident())
        time.sleep(0.001 * (item % 3))
        return -item

    with thread_pool(threads) as parallel_map:
        assert list(parallel_map(work, range(items))) == [-item for item in range(items)]
    assert len(workers) == min(threads, items)
    assert not workers or threading.get_ident() in workers


@pytest.mark.parametrize("in_caller", [True, False], ids=["in the calling thread", "in another"])
def test_an_error_in_a_thread_drops_pending_work(in_caller):
    meeting, begun = threading.Barrier(2), []

    def work(item):
        begun.append(item)
        meeting.wait(60)
        if (threading.current_thread() is threading.main_thread()) == in_caller:
            raise ZeroDivisionError
        time.sleep(0.2)  # the other has failed by then

    with thread_pool(2) as parallel_map, pytest.raises(ZeroDivisionError):
        list(parallel_map(work, range(1000)))
    assert sorted(begun) == [0, 1]


def test_gradient_of_shards_is_the_sum(tiny):
    mlp = MLP(SMALL, dtype=np.float64)
    with thread_pool(3) as parallel_map:
        sums = Shards(parallel_map, NumpyBackend(), tiny.train_images, tiny.train_labels, mlp.dtype).gradient(mlp)
    x = NumpyBackend().prepare(tiny.train_images, np.float64)
    loss, correct, gradient = mlp.gradients(NumpyBackend(), x, tiny.train_labels)
    assert (sums.loss, sums.correct) == (pytest.approx(loss, rel=1e-13), correct)
    for ours, theirs in zip(sums.gradient, gradient):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12 * np.abs(theirs).max())


@pytest.mark.parametrize("batch_size", [None, 700])
@pytest.mark.parametrize("limit", [0, 100_000])
def test_same_bits_when_images_are_prepared_again(backend, tiny, limit, batch_size):
    few = limited(tiny, 1400)
    ours, history = trained(backend, few, memory_limit=limit, batch_size=batch_size, threads=2)
    theirs, other_history = trained(backend, few, batch_size=batch_size)
    for our, their in zip(ours, theirs):
        np.testing.assert_array_equal(our, their)
    assert results(history) == results(other_history)


def test_kept_images_stay_within_the_memory_limit(tiny):
    """Four shards of 650 images of 25 pixels take 100 bytes for each image in float32: two fit."""
    prepared = []

    class Counting(NumpyBackend):
        def _prepare(self, images, dtype):
            prepared.append(len(images))
            return super()._prepare(images, dtype)

    memory, mlp = Memory(140_000), MLP(SMALL)
    with thread_pool(1) as parallel_map:
        shards = Shards(parallel_map, Counting(), tiny.train_images, tiny.train_labels, mlp.dtype, memory)
        assert memory.used == 130_000
        for sums in (Shards.gradient, Shards.evaluate):
            prepared.clear()
            sums(shards, mlp)
            assert prepared == [650] * 2
        assert memory.used == 130_000
        del shards
    assert memory.used == 0


def test_a_memory_limit_needs_nbytes(tiny):
    class Sizeless(NumpyBackend):
        def _prepare(self, images, dtype):
            return csr_array(super()._prepare(images, dtype))

    assert trained(Sizeless(), tiny)
    with pytest.raises(ValueError, match="a memory limit needs nbytes of prepared images, which csr_array lacks"):
        trained(Sizeless(), tiny, memory_limit=0)


@pytest.mark.parametrize("options", [{"learning_rate": 1e30}, {"learning_rate": 1e30, "epochs": 1}])
def test_a_loss_that_is_not_finite_stops_training(backend, tiny, options):
    with pytest.raises(TrainingError, match=r"in epoch \d with learning rate 1e\+30: try a smaller learning rate"):
        trained(backend, tiny, **{"epochs": 9, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs .* must be at least 1, not 0"),
        ({"eval_every": 0}, "eval_every must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, not 0.0"),
        ({"learning_rate": float("nan")}, "not nan"),
        ({"learning_rate": 1e-44}, "learning_rate 1e-44, divided by 2600 images per step, is 0 in float32"),
        ({"learning_rate": "0.1"}, "learning_rate must be positive and finite, not '0.1'"),
        ({"memory_limit": "500 MB"}, "memory_limit must be a number of bytes, 0 or more, not '500 MB'"),
        ({"epochs": 1.5}, "epochs must be a whole number, not 1.5"),
        ({"batch_size": 32.0}, "batch_size must be a whole number, not 32.0"),
        ({"batch_size": 0}, "batch_size must be from 1 to 2600, .* not 0"),
        ({"batch_size": 2601}, "not 2601"),
        ({"threads": 0}, "threads must be at least 1, not 0"),
        ({"memory_limit": -1}, "memory_limit must be a number of bytes, 0 or more, not -1"),
    ],
)
def test_wrong_options_are_refused(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        trained(NumpyBackend(), tiny, **options)


def test_the_smallest_learning_rates_depend_on_dtype_and_batch(tiny):
    smallest = float(np.finfo(np.float32).smallest_subnormal)
    trained(NumpyBackend(), limited(tiny, 8), learning_rate=8 * smallest, batch_size=8, epochs=1)
    trained(NumpyBackend(), tiny, dtype=np.float64, learning_rate=1e-44, epochs=1)
    with pytest.raises(ValueError, match="is 0 in float32"):
        trained(NumpyBackend(), limited(tiny, 8), learning_rate=4 * smallest, batch_size=8, epochs=1)


def test_the_name_of_a_backend_is_not_a_backend(tiny):
    with pytest.raises(ValueError, match=r"must be a Backend, such as get_backend\('numpy'\), not 'sparse'"):
        trained("sparse", tiny)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda d: {"test_labels": d.test_labels[:-1]}, "100 test images but 99 labels"),
        (lambda d: {"train_labels": d.train_labels[:1024]}, "2600 training images but 1024 labels"),
        (lambda d: {"train_images": d.train_images[:9]}, "9 training images but 2600 labels"),
        (lambda d: {"train_images": d.train_images[:0], "train_labels": d.train_labels[:0]}, "no training images"),
        (lambda d: {"test_images": d.test_images[:0], "test_labels": d.test_labels[:0]}, "no test images"),
        (lambda d: {"test_images": d.test_images[:, 1:]}, "test images have 24 pixels, but the network takes 25"),
        (lambda d: {"train_images": d.train_images[:, 1:]}, "training images have 24 pixels, but the network takes 25"),
        (lambda d: {"test_labels": d.test_labels + 1}, "test labels must be from 0 to 9, not 1 to 10"),
        (lambda d: {"train_labels": d.train_labels.astype(np.int8) - 1}, "training labels must be from 0 to 9, not -1"),
        (lambda d: {"test_labels": d.test_labels / 1}, "test labels must be integers, not float64"),
        (lambda d: {"train_images": d.train_images.tolist()}, r"training images must be an array .* numpy\.asarray"),
        (lambda d: {"test_labels": d.test_labels.tolist()}, r"test labels must be an array of shape \(n,\)"),
        (lambda d: {"train_images": d.train_images.reshape(-1, 5, 5)}, r"training images must be .* \(n, pixels\)"),
    ],
)
@pytest.mark.parametrize("batch_size", [None, 64])
def test_images_and_labels_that_do_not_match_are_refused(tiny, changed, message, batch_size):
    """Before any work: nothing is prepared, and the network is unchanged."""

    class Untouched(NumpyBackend):
        def prepare(self, images, dtype=np.float32):
            pytest.fail("work began")

    with pytest.raises(ValueError, match=message):
        trained(Untouched(), tiny._replace(**changed(tiny)), batch_size=batch_size)


def blas_threads():
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


def test_overlapping_runs_share_the_blas_thread_limit(digits28):
    """The first to end keeps the limit for the other; the last restores the previous number, two threads here."""
    few, alone = limited(digits28, 3000), {}
    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        for seed in (1, 2):
            alone[seed] = [array.tobytes() for array in trained(NumpyBackend(), few, (784, 64, 10), seed=seed)[0]]
        begun, ended = threading.Event(), threading.Event()
        during = []

        def wait_for_the_other(state):
            begun.set()
            if state.history.epochs:
                ended.wait(60)
                during.append(blas_threads())

        def longer():
            return trained(NumpyBackend(), few, (784, 64, 10), seed=2, on_step=wait_for_the_other, threads=1)[0]

        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(longer)
            begun.wait(60)
            first = trained(NumpyBackend(), few, (784, 64, 10), seed=1, threads=1)[0]
            ended.set()
            both = {1: first, 2: second.result()}
        assert {seed: [array.tobytes() for array in parameters] for seed, parameters in both.items()} == alone
        assert all(set(counts) == {1} for counts in during)
        assert during
        assert blas_threads() == before


def test_a_small_batch_runs_on_one_thread(tiny):
    few = tiny._replace(train_images=tiny.train_images[:64], train_labels=tiny.train_labels[:64])
    seen = set()

    class Watched(NumpyBackend):
        def _relu(self, z):
            seen.add(threading.get_ident())
            return super()._relu(z)

    trained(Watched(), few, batch_size=8, threads=8)
    assert seen == {threading.get_ident()}


def test_an_error_in_a_worker_reaches_the_caller(tiny):
    class Broken(NumpyBackend):
        def _relu(self, z):
            raise RuntimeError("broken kernel")

    with pytest.raises(RuntimeError, match="broken kernel"):
        trained(Broken(), tiny, threads=2)


def test_history_repr():
    epochs = [Epoch(number, 2.5, 0.5, 0.25, 0.125) for number in range(1, 251)]
    lines = repr(History(0.0, epochs)).splitlines()
    assert lines[0] == "<History of 250 epochs>"
    assert lines[2] == "    1  2.5000  50.00%  25.00%    0.125"
    assert lines[-1].split()[0] == "250"
    assert len(lines) <= 13
    assert repr(History()) == "<History of 0 epochs>"
    assert repr(History(0.0, [Epoch(1, 2.5, 0.5, None, 0.125)])).splitlines()[2].split()[3] == "-"
