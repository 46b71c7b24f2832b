"""Kernels called from many threads at once, and in processes that fork: the same bits, no crash, no deadlock."""

import faulthandler
import functools
import multiprocessing
import os
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from kernels import get_backend
from kernels.compiling import flat_in, kernel
from kernels.numpy_backend import NumpyBackend
from model.data import Dataset
from model.mlp import MLP
from model.training import train
from tests.support.systems import forks

THREADS = 8
SECONDS = 120  # for what takes one or two


def work(backend, seed):
    """The four kernels on this thread's data, in both dtypes: all results as bytes."""
    rng = np.random.default_rng(seed)
    n, pixels = (20, 30) if backend.too_slow_for_full_batches else (500, 300)  # long enough for threads to overlap
    images = rng.integers(0, 256, (n, pixels), np.uint8) * (rng.random((n, pixels)) < 0.2).astype(np.uint8)
    labels = rng.integers(0, 10, n)
    results = []
    for dtype in (np.float32, np.float64):
        mlp = MLP((pixels, 33, 10), seed, dtype)
        loss, correct, gradient = mlp.gradients(backend, backend.prepare(images, dtype), labels)
        results += [np.array([loss, correct]).tobytes(), *(part.tobytes() for part in gradient)]
    return results


def training(backend):
    """A few epochs on several threads: all parameters as bytes."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (1500, 12), np.uint8), rng.integers(0, 10, 1500).astype(np.uint8)
    mlp = MLP((12, 5, 10))
    train(mlp, backend, Dataset("noise", images, labels, images[:9], labels[:9]), epochs=2, threads=3)
    return [parameter.tobytes() for parameter in mlp.parameters]


def in_threads(function):
    """Call it with the number of each thread, in all of them at once."""
    barrier = threading.Barrier(THREADS)

    def start_together(number):
        barrier.wait(SECONDS)
        return function(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(start_together, range(THREADS), timeout=SECONDS))


@pytest.fixture
def blas_on_one_thread():
    """As in training: with several threads, OpenBLAS rounds differently."""
    with threadpool_limits(1, user_api="blas"):
        yield


@pytest.mark.usefixtures("blas_on_one_thread")
def test_concurrent_calls_give_the_same_bits(backend):
    rounds = 20
    expected = [work(backend, seed) for seed in range(THREADS)]

    def same_every_time(number):
        return all(work(backend, number) == expected[number] for _ in range(rounds))

    assert all(in_threads(same_every_time))


@pytest.mark.slow
@pytest.mark.usefixtures("blas_on_one_thread")
def test_first_calls_from_many_threads(backend):
    """In a new process, where all threads race to compile the kernels or load them from the cache."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        results = process.submit(first_calls, backend.name).result(SECONDS)
    assert results == [work(backend, 0)] * THREADS


def first_calls(name):
    backend = get_backend(name)
    with threadpool_limits(1, user_api="blas"):
        return in_threads(lambda _: work(backend, 0))


@forks
def test_a_fork_waits_for_a_kernel_that_is_being_compiled():
    """Otherwise the child, which lacks the compiling thread, would wait for it forever."""
    compiling, finish, codes = threading.Event(), threading.Event(), []

    def wait_while_compiling(dtype):
        compiling.set()
        assert finish.wait(SECONDS)
        return flat_in(dtype)

    slow, array = kernel_that_does_nothing(wait_while_compiling), np.ones(1)
    compiler = threading.Thread(target=slow, args=(array,))
    compiler.start()
    assert compiling.wait(SECONDS)
    forking = threading.Thread(target=fork_and_compile, args=(codes, array))
    forking.start()
    forking.join(0.2)
    assert not codes
    finish.set()
    for thread in compiler, forking:
        thread.join(SECONDS)
    assert codes == [0]


def kernel_that_does_nothing(parameter):
    """Without a file in the cache, as its source is not a file."""
    namespace = {}
    exec("def nothing(x): pass", namespace)
    return kernel(parameter)(namespace["nothing"])


def fork_and_compile(codes, array):
    if child := os.fork():
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        return
    faulthandler.dump_traceback_later(SECONDS / 2, exit=True)
    code = 1
    try:
        kernel_that_does_nothing(flat_in)(array)
        code = 0
    finally:
        os._exit(code)


@forks
def test_forked_processes(backend):
    if isinstance(backend, NumpyBackend) and sys.platform == "darwin":
        pytest.skip("Apple's Accelerate, NumPy's BLAS there, does not survive a fork")
    tasks = [functools.partial(work, backend, 0), functools.partial(training, backend)]
    expected = [task() for task in tasks]
    in_threads(lambda number: work(backend, number))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [context.Process(target=lambda: results.put([task() for task in tasks])) for _ in range(3)]
    try:
        for child in children:
            child.start()
        for _ in children:
            assert results.get(timeout=SECONDS) == expected
        for child in children:
            child.join(SECONDS)
            assert child.exitcode == 0
    finally:
        for child in children:
            child.kill()
    assert [task() for task in tasks] == expected


@pytest.mark.slow
@forks
@pytest.mark.usefixtures("blas_on_one_thread")
def test_forks_while_other_threads_compute(backend):
    """OpenBLAS does not allow that, even on one thread: each product briefly holds a lock over the list of its buffers,
    and a child forked at that moment waits for it forever (one fork in 600 beside small products).
    """
    if isinstance(backend, NumpyBackend):
        pytest.skip("the child of a fork during a product of OpenBLAS may wait for its alloc_lock forever")
    tasks = [functools.partial(work, backend, 0), functools.partial(training, backend)]
    expected = [task() for task in tasks]
    begin, stopped = threading.Barrier(4), threading.Event()

    def compute():
        begin.wait(SECONDS)
        while not stopped.is_set():
            assert work(backend, 0) == expected[0]

    def compute_in_child():
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        assert [task() for task in tasks] == expected

    context = multiprocessing.get_context("fork")
    with ThreadPoolExecutor(3) as pool:
        computing = [pool.submit(compute) for _ in range(3)]
        try:
            begin.wait(SECONDS)
            for _ in range(10):
                child = context.Process(target=compute_in_child)
                child.start()
                child.join(2 * SECONDS)
                child.kill()
                assert child.exitcode == 0
        finally:
            stopped.set()
    for each in computing:
        each.result()
