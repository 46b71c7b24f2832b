"""Study: an epoch on every compiled backend, in turn, and the big products of an epoch on OpenBLAS alone."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from bench.interleave import Ratio, interleave, ratios
from kernels import backend_names, get_backend
from model.data import Dataset
from model.mlp import MLP
from model.trainer import Shards, available_cores, descend, thread_pool


def measure(dataset: Dataset, quick: bool) -> list[Ratio]:
    """An epoch on every compiled backend against NumPy's, and the two big products alone on OpenBLAS."""
    rounds, threads = 3 if quick else 30, available_cores()
    with thread_pool(threads) as run:
        mlps: dict[str, MLP] = {}
        competitors: dict[str, Callable[[], Any]] = {}
        for name in [name for name in backend_names() if name != "naive"]:
            mlp = mlps[name] = MLP()
            shards = Shards(run, get_backend(name), dataset.train_images, dataset.train_labels, mlp.dtype)
            competitors[name] = partial(descend, mlp, shards, 0.3)
        x = get_backend("numpy").prepare(dataset.train_images)
        weights, upstream = mlps["numpy"].layers[0][0].copy(), np.ones((len(x), 128), np.float32)

        def big_products() -> None:
            with threadpool_limits(threads, user_api="blas"):
                x @ weights
                x.T @ upstream

        seconds = interleave({**competitors, "big products, OpenBLAS": big_products}, rounds)
    for mlp in mlps.values():
        for ours, theirs in zip(mlp.parameters, mlps["numpy"].parameters):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    return ratios("epoch", seconds, "numpy") + [
        ratio for ratio in ratios("epoch", seconds, "big products, OpenBLAS") if ratio["competitor"] != "numpy"
    ]
