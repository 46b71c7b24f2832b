"""Study: the big products of the numba backend against OpenBLAS's, and one product of textbook shape."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.progress import track
from threadpoolctl import threadpool_limits

from bench.measure.interleave import interleave
from bench.measure.records import Comparison
from bench.peers.task import UnavailableError, package
from kernels import get_backend
from model.data import Dataset
from model.threads import available_cores

# Left operand, right operand; the big ones are x W1 and x.T dz over all images, and the same over one chunk.
PRODUCTS = {
    "(60000×784)(784×128)": ((60_000, 784), (784, 128), False),
    "(784×60000)(60000×128)": ((60_000, 784), (60_000, 128), True),
    "(1024×784)(784×128)": ((1024, 784), (784, 128), False),
    "(784×1024)(1024×128)": ((1024, 784), (1024, 128), True),
    "1024³": ((1024, 1024), (1024, 1024), False),
}


@dataclass(frozen=True)
class Found:
    """What the study found."""

    products: list[Comparison]
    """One for each shape and number of threads."""
    kind: Literal["products"] = "products"


def measure(dataset: Dataset, quick: bool) -> Found:
    """The numba backend's products against OpenBLAS's, on one thread and, rows split over plain threads, on all.

    On one thread MKL takes part, too, where PyTorch brings it; on more, its idle threads would disturb the next timing.
    Takes about 40 seconds, or 15.
    """
    rounds = 3 if quick else 8
    found = []
    for shape, (left, right, transposed) in track(PRODUCTS.items(), "products", transient=True):
        rng = np.random.default_rng(0)
        a, b = rng.standard_normal(left, np.float32), rng.standard_normal(right, np.float32)
        a = a.T if transposed else a
        for threads in sorted({1, available_cores()}):
            with ThreadPoolExecutor(threads) as pool, threadpool_limits(threads, user_api="blas"):
                ours = _split_product(a, b, threads, pool)
                np.testing.assert_allclose(np.concatenate(ours()), a @ b, rtol=0, atol=1e-5 * a.shape[1])
                competitors: dict[str, Callable[[], Any]] = {"numba": ours, "OpenBLAS": partial(np.matmul, a, b)}
                if threads == 1:
                    competitors |= _mkl(a, b)
                seconds = interleave(competitors, rounds if a.size > 1e7 else 10 * rounds)
                found.append(Comparison.of(f"{shape}, {threads} thread{'s' * (threads > 1)}", seconds))
    return Found(found)


def _mkl(a: NDArray, b: NDArray) -> dict[str, Callable[[], Any]]:
    """A product by PyTorch's MKL on one thread; nothing where there is none."""
    try:
        torch = package("torch")
    except UnavailableError:
        return {}
    if not torch.backends.mkl.is_available():
        return {}
    torch.set_num_threads(1)
    left, right = torch.from_numpy(a), torch.from_numpy(b)
    np.testing.assert_allclose((left @ right).numpy(), a @ b, rtol=0, atol=1e-5 * a.shape[1])
    return {"MKL": partial(torch.mm, left, right)}


def _split_product(a: NDArray, b: NDArray, threads: int, pool: ThreadPoolExecutor) -> Callable[[], list[NDArray]]:
    """A function that computes A B by the numba backend, the rows of A split over the caller and the `pool`."""
    numba = get_backend("numba")
    first, *others = np.array_split(a, threads)

    def product() -> list[NDArray]:
        futures = [pool.submit(numba.matmul, part, b) for part in others]
        return [numba.matmul(first, b), *(future.result() for future in futures)]

    return product
