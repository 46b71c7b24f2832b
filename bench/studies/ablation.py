"""Study: an ablation of the sparse backend. Both products run on one thread with and without each technique."""

import importlib.util
import itertools
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numba
import numpy as np
from numba import njit
from numpy.typing import NDArray
from rich.progress import track
from scipy.sparse import csr_array

from bench.measure.interleave import interleave
from bench.measure.records import Comparison
from kernels import get_backend, sparse_backend
from kernels.backend import Backend
from kernels.numba_backend import NumbaBackend
from kernels.sparse_backend import GROUP, NonZeros
from model.data import Dataset
from model.shards import SHARD
from model.threads import thread_pool

SHARDS = 20
UNITS = 128


@dataclass(frozen=True)
class Result:
    """The study's record."""

    forward: Comparison
    """Seconds of the forward product over the data set, by variant."""
    backward: Comparison
    """Seconds of the backward product, from the same rounds."""
    megabytes: dict[str, float]
    """Size of the images in both forms, by variant."""
    kind: Literal["ablation"] = "ablation"


def measure(dataset: Dataset, quick: bool) -> Result:
    """Time both products over the data set for each variant, and compute the size of its images in both forms."""
    images = dataset.train_images[: SHARDS * SHARD]
    shards = np.array_split(images, -(-len(images) // SHARD))
    without_zeros = [np.maximum(shard, 1) for shard in shards]
    with ExitStack() as stack:
        stack.enter_context(thread_pool(1))
        sparse = get_backend("sparse")
        regrouped = stack.enter_context(variant(GROUP=str(3 - GROUP)))
        unfetched = stack.enter_context(variant(AHEAD="0"))
        variants: dict[str, tuple[Backend, list[Any]]] = {
            "dense, OpenBLAS": prepared(get_backend("numpy"), shards),
            "dense, `numba`": prepared(get_backend("numba"), shards),
            "zeros skipped by plain loops, no blocks": prepared(PlainLoops(), shards),
            "**`sparse`: blocks, masks, order, prefetching**": prepared(sparse, shards),
            "without skipping: images without zeros": prepared(sparse, without_zeros),
            "without order: groups as they come": shuffled(*prepared(sparse, shards)),
            "without prefetching of results": prepared(unfetched, shards),
            f"{'one row' if GROUP == 2 else 'two rows'} at a time": prepared(regrouped, shards),
        }
        products = {
            (name, way): products_of(backend, xs, transposed)
            for name, (backend, xs) in variants.items()
            for way, transposed in (("forward", False), ("backward", True))
        }
        check_equal({key: product for key, product in products.items() if "without skipping" not in key[0]})
        seconds = interleave({" · ".join(key): product for key, product in products.items()}, 3 if quick else 25)
    scale = len(dataset.train_images) / len(images)
    forward, backward = (
        Comparison.of(f"{way} product", {name: scale * seconds[f"{name} · {way}"] for name in variants})
        for way in ("forward", "backward")
    )
    megabytes = {
        name: scale * sum(nbytes(x) for x in xs) / 1e6
        for name, (_, xs) in track(variants.items(), "memory", transient=True)
    }
    return Result(forward, backward, megabytes)


def prepared(backend: Backend, shards: list[NDArray]) -> tuple[Backend, list[Any]]:
    """A backend, and the images as it prepares them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of dense images being slow on this backend, which is the point
        return backend, [backend.prepare(shard) for shard in shards]


def products_of(backend: Backend, xs: list[Any], transposed: bool) -> Callable[[], list[NDArray]]:
    """A function that computes the forward product of every shard, or the backward one."""
    lefts = [(x.T.tocsr() if isinstance(x, csr_array) else x.T) if transposed else x for x in xs]
    b = np.random.default_rng(0).standard_normal((max(left.shape[1] for left in lefts), UNITS), np.float32)
    return lambda: [backend.matmul(left, b[: left.shape[1]]) for left in lefts]


def nbytes(x: Any) -> int:
    """Bytes of the images in both forms; SciPy's compressed rows are one form, so they count twice."""
    return x.nbytes if hasattr(x, "nbytes") else 2 * (x.data.nbytes + x.indices.nbytes + x.indptr.nbytes)


def check_equal(products: dict[tuple[str, str], Callable[[], list[NDArray]]]) -> None:
    """Raise an AssertionError if variants differ by more than the rounding errors of sums over 784 products."""
    for _, same in itertools.groupby(sorted(products, key=lambda key: key[1]), key=lambda key: key[1]):
        first, *others = [products[key]() for key in same]
        for other in others:
            for ours, theirs in zip(other, first):
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=784 * float(np.finfo(np.float32).eps) * 10)


@contextmanager
def variant(**constants: str) -> Iterator[Backend]:
    """The sparse backend with other constants, compiled from a modified copy of its source."""
    source = Path(sparse_backend.__file__).read_text(encoding="utf-8")
    for name, value in constants.items():
        source, count = re.subn(rf"^({name}\b.*) = .*$", rf"\1 = {value}", source, flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"the sparse backend defines the constant {name} {count} times, not once")
    chosen = numba.config.CACHE_DIR  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sparse_variant.py"
        file.write_text(source, encoding="utf-8")
        spec: Any = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        numba.config.CACHE_DIR = folder  # type: ignore[attr-defined]
        try:
            spec.loader.exec_module(module)
            backend = module.SparseBackend()
            x = backend.prepare(np.ones((2, 2), np.uint8))
            backend.matmul(x, np.ones((2, 2), np.float32))
        finally:
            numba.config.CACHE_DIR = chosen  # type: ignore[attr-defined]
        yield backend


def shuffled(backend: Backend, xs: list[Any]) -> tuple[Backend, list[Any]]:
    """The same images, but the groups of each block in random order: the branch predictor cannot learn trip counts."""

    def reordered(form: NonZeros) -> NonZeros:
        rng = np.random.default_rng(0)
        rows, masks = (array.reshape(-1, GROUP) for array in (form.rows, form.masks))
        ends = np.cumsum([sum(mask.bit_count() for mask in group) for group in masks.tolist()])
        values = np.split(form.values, ends)
        bounds = np.cumsum(form.groups)
        order = np.concatenate([rng.permutation(np.arange(b - n, b)) for b, n in zip(bounds, form.groups)])
        return form._replace(
            rows=rows[order].ravel(),
            masks=masks[order].ravel(),
            values=np.concatenate([*(values[group] for group in order), values[-1]]),
        )

    return backend, [replace(x, nonzeros=reordered(x.nonzeros), transposed=reordered(x.transposed)) for x in xs]


class PlainLoops(NumbaBackend):
    """Compressed sparse rows (CSR) and plain loops, compiled by Numba. LLVM vectorizes the innermost loop."""

    def _prepare(self, images, dtype):
        return csr_array(super()._prepare(images, dtype))

    def _matmul(self, a, b, bias):
        out = np.zeros((a.shape[0], b.shape[1]), b.dtype)
        multiply_rows(a.indptr, a.indices, a.data, b, out)
        return out


@njit(nogil=True)
def multiply_rows(starts, columns, values, b, out):
    """out += A B, where A is in CSR."""
    for i in range(len(out)):
        row = out[i]
        for n in range(starts[i], starts[i + 1]):
            value, b_row = values[n], b[columns[n]]
            for j in range(len(row)):
                row[j] += value * b_row[j]
